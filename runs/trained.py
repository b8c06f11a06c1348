"""Trained networks, from run directories or from other checkpoints."""
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

NEEDED = {"model_name": "--model", "dataset": "--dataset"}  # parameters and their options
# Parameters of a run that describe its network and images.
RECORDED = (*NEEDED, "model_options", "num_channels", "dropout_rate", "image_size", "background",
            "interpolation", "mean", "std")


@dataclass(frozen=True)
class Source:
    """Checkpoint with the parameters of its network and images, recorded by the run or given."""

    name: str  # as given
    checkpoint: Checkpoint
    params: Params  # those of network and images are valid, including mean and std if the run had defaults

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """Build the network on the CPU, in eval mode.

        Raises UserError if it does not accept images of this size or the weights do not fit.
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
    """Read a checkpoint, from a file or a run directory.

    file: name of the checkpoint in a run directory. given: parameters that replace recorded ones; checkpoints from
    elsewhere need `model_name` and `dataset`. default: source whose parameters a checkpoint without a record gets.
    Raises UserError if parameters are missing or invalid or the file cannot be loaded, and if an untrusted checkpoint
    names code to import: only `given` or the params.json of the directory may do so.
    """
    path, chosen, trusted = Path(name), dict(given or {}), None
    loaded = checkpoint.load(path / file if path.is_dir() else name)
    data, own = (loaded.content.get(key) for key in ("data", "params"))
    values: dict[str, Any] = {}
    if default is not None and data is None and own is None:
        own = {key: getattr(default.params, key) for key in RECORDED}
        trusted = default.params.model_name
    for record in (data, own, chosen):  # later ones take precedence
        if isinstance(record, dict):
            values |= {key: record[key] for key in RECORDED if record.get(key) is not None}
    if missing := [option for key, option in NEEDED.items() if key not in values]:
        raise UserError(f"{name} has no record of its network and data: give {' and '.join(missing)}")
    params = check_params(values | {"learning_rate": 1.0, "num_epochs": 1}, path, SCRATCH, {})
    model = params.model_name
    if imports_code(model) and model not in (chosen.get("model_name"), trusted, _named_in(path)):
        raise UserError(f"{name} names code to import, {model}: if you trust it, give --model {model}")
    return Source(name, loaded, params)


def _named_in(directory: Path) -> Any:
    """`model_name` of the params.json in a directory; None if there is none."""
    try:
        return read_json(directory / "params.json").get("model_name")
    except (UserError, OSError):
        return None
