"""Networks of a run, built from parameters or loaded from checkpoints, with the files that were read."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from utils import checkpoint, data_record, memory, seeds
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.params import Params


class Networks:
    """Builds the networks of a run on the device, with weights from a checkpoint or from the seed.

    `sources`: path and SHA-256 of every checkpoint that was read, by role. `warnings`: differences between this run's
    data and the data that a checkpoint was trained on.
    """

    def __init__(self, build_model: Callable[..., nn.Module], params: Params, data: Mapping[str, Any],
                 device: torch.device) -> None:
        """build_model: see `model.build_model`. data: the record of the run's data."""
        self._build_model, self._params, self._data, self._device = build_model, params, data, device
        self.sources: dict[str, dict[str, str]] = {}
        self.warnings: list[str] = []

    def trained(self) -> nn.Module:
        """Build the network to train, with weights from the checkpoint `init_from` or random ones."""
        params = self._params
        with self._phase("model_name"):
            network = self._build(params.model_name, "model_name", params.model_options,
                                  num_channels=params.num_channels, dropout_rate=params.dropout_rate)
            if params.init_from:
                self.load(network, checkpoint.load(params.init_from, "init_from"), "init_from")
            return network

    def frozen(self, role: str) -> nn.Module:
        """Build a trained network from `ROLE_model`, `ROLE_num_channels`, `ROLE_model_options` and `ROLE_resume`."""
        name, channels, options, path = (getattr(self._params, f"{role}_{key}")
                                         for key in ("model", "num_channels", "model_options", "resume"))
        with self._phase(f"{role}_model"):
            network = self._build(name or self._params.model_name, f"{role}_model", options, num_channels=channels)
            self.load(network, checkpoint.load(path, f"{role}_resume"), role)
            return network

    def load(self, network: nn.Module, source: Checkpoint, role: str) -> None:
        """Copy the weights of a checkpoint into a network. Raises UserError if they do not fit."""
        checkpoint.load_weights(network, source, role)
        self.warnings += data_record.compare_origin(source, self._data, role)
        self.sources[role] = source.source

    def _phase(self, key: str) -> memory.Phase:
        remedies = [f'choose a smaller network ("{key}")', memory.reduce(self._params, "image_size")]
        return memory.Phase("building the network", " or ".join(filter(None, remedies)))

    def _build(self, name: str, key: str, options: dict[str, Any], **sizes: Any) -> nn.Module:
        params, size = self._params, self._data["image_size"]
        torch.manual_seed(seeds.derive_seed(params.seed, params.weight_stream))
        try:
            network = self._build_model(name, len(self._data["classes"]), options=options, image_size=size, **sizes)
        except ValueError as error:
            raise UserError(f'"{key}": {error}') from None
        try:
            check_image_size(network, size)
        except ValueError as error:
            hint = ' ("image_size")' if params.dataset.startswith("folder:") else ""
            raise UserError(f'"{key}": {error}{hint}') from None
        if code := getattr(network, "imported_code", None):  # absent for other build_model functions
            self.warnings.append(f"{key}: {name} was imported from {code}")
        return network.to(self._device).to(memory_format=torch.channels_last).train()


def check_image_size(network: nn.Module, size: int) -> None:
    """Raise a one-line ValueError if a network does not accept images of size x size pixels. Sets eval mode."""
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, size, size))
    except (ValueError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
