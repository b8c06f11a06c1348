"""Trained networks, from the directories of runs or from checkpoints of other people."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from model import build_model
from model.imported import imports_code
from runs.stages import SCRATCH
from utils import checkpoint
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.files import read_json
from utils.networks import check_image_size
from utils.params import Params, check_params

NEEDED = {"model_name": "--model", "dataset": "--dataset"}  # parameters, and the options that give them
# What else a run records of its network and images.
RECORDED = (*NEEDED, "model_options", "num_channels", "dropout_rate", "image_size", "background", "mean", "std")


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the parameters that say what it holds: its own, where a run wrote it, and given ones."""

    name: str  # as it was asked for
    checkpoint: Checkpoint
    params: Params  # of these, what concerns the network and its images; mean and std also where the run had a default

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """The network, on the CPU and in eval mode.

        Raises UserError where it does not take images of this size or the weights do not fit it.
        """
        params = self.params
        try:
            network = build_model(params.model_name, num_classes, num_channels=params.num_channels,
                                  dropout_rate=params.dropout_rate, options=params.model_options,
                                  image_size=image_size)
            check_image_size(network, image_size)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None
        checkpoint.load_weights(network, self.checkpoint)
        return network.eval()


def read_source(name: str, file: str = "last_model.tar", given: Mapping[str, Any] | None = None,
                default: Source | None = None) -> Source:
    """Read a checkpoint: that of a run's directory, or a file.

    file: which one of a directory. given: parameters that replace the checkpoint's own, and that one which no run of
    ours wrote needs: `model_name` and `dataset`. default: the source whose network and images a checkpoint has that
    says nothing of its own. Raises UserError where they are missing or wrong or nothing can be
    loaded, and where the checkpoint, which may come from anyone, names code to import: that is the user's own choice,
    by `given` or in the params.json of the directory.
    """
    path, chosen, trusted = Path(name), dict(given or {}), None
    loaded = checkpoint.load(path / file if path.is_dir() else name)
    data, own = (loaded.content.get(key) for key in ("data", "params"))
    values: dict[str, Any] = {}
    if default is not None and data is None and own is None:
        own = {key: getattr(default.params, key) for key in RECORDED}
        trusted = default.params.model_name
    for record in (data, own, chosen):  # the later ones win
        if isinstance(record, dict):
            values |= {key: record[key] for key in RECORDED if record.get(key) is not None}
    if missing := [option for key, option in NEEDED.items() if key not in values]:
        raise UserError(f"{name} does not say which network and data it is of: give {' and '.join(missing)}")
    params = check_params(values | {"learning_rate": 1.0, "num_epochs": 1}, path, SCRATCH, {})
    model = params.model_name
    if imports_code(model) and model not in (chosen.get("model_name"), trusted, _named_in(path)):
        raise UserError(f"{name} names code to import, {model}: if you trust it, --model {model} imports it")
    return Source(name, loaded, params)


def _named_in(directory: Path) -> Any:
    """`model_name` of the params.json in a directory; None where there is none."""
    try:
        return read_json(directory / "params.json").get("model_name")
    except (UserError, OSError):
        return None
