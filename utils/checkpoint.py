"""Checkpoints: atomic saves, loads that execute no code, weights checked name by name.

A checkpoint is a `torch.save` of a dict with the published keys `epoch` (epochs done), `state_dict` and `optim_dict`,
and further ones. Weights from elsewhere load too: a bare state dict, one under another usual key, safetensors, half
precision, names with the prefixes of wrappers. `FILE#KEY` selects one of several state dicts in a file.
"""
from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import files, formats
from utils.errors import UserError
from utils.file_kinds import WRAPPER_KEYS, keys_of

# Parts of names that DataParallel, torch.compile and Lightning add, and a counter that AveragedModel adds.
_WRAPPERS = frozenset({"module", "_orig_mod", "model"})
_WRAPPER_COUNTER = "n_averaged"


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file, with its path and SHA-256."""

    path: Path
    sha256: str
    content: dict[str, Any]
    key: str | None = None  # of `FILE#KEY`

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name, unchanged from the file."""
        return self.content["state_dict"]

    @property
    def source(self) -> dict[str, str]:
        """Origin of the weights, for the records of a run: `path`, `sha256` and, with one, `key`."""
        source = {"path": str(self.path), "sha256": self.sha256}
        return source | {"key": self.key} if self.key else source


def weights_id(source: Mapping[str, str]) -> str:
    """Identifier of the weights of a `Checkpoint.source`: hash of the file, and the key in it."""
    return "#".join(filter(None, (source.get("sha256"), source.get("key"))))


def save(content: dict[str, Any], *paths: Path) -> None:
    """Write a checkpoint atomically to each path: a kill, a crash or a full disk leaves the previous file intact."""
    buffer = io.BytesIO()  # a full disk is then an OSError, not a RuntimeError inside torch
    torch.save(content, buffer)
    for path in paths:
        files.write(path, buffer.getbuffer())


class Writer:
    """Saves checkpoints in a background thread, one at a time, while training continues."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)  # the process waits for it at exit
        self._pending: Future[None] | None = None

    def save(self, content: dict[str, Any], *paths: Path) -> None:
        """Save a copy of the present content, see `save`. Raises the error of the previous save."""
        self.wait()
        self._pending = self._pool.submit(save, _copied(content), *paths)

    def wait(self) -> None:
        """Wait until everything is on disk. Raises the error of the last save."""
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        finally:
            del pending  # breaks a cycle: future, error, traceback, this frame


def _copied(content: Any) -> Any:
    """The content with all tensors copied to the CPU, so that later steps do not change them."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def load(name: str | Path, role: str = "checkpoint") -> Checkpoint:
    """Load a checkpoint, `FILE` or `FILE#KEY`, onto the CPU.

    Only tensors and plain values are unpickled, so untrusted files are safe. Raises UserError that begins with `role`
    and names the file.
    """
    path, key = files.split_key(name)
    check_exists(path, role)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{role}: cannot read {path}: {error.strerror}") from None
    try:
        content = formats.parse(raw, path)
    except ValueError as error:
        raise UserError(f"{role}: {path} cannot be loaded: {error}") from None
    if key is None and formats.is_weights(content):
        content = {"state_dict": content}
    try:
        content = _select(content, key, path)
    except ValueError as error:
        raise UserError(f"{role}: {path} {error}") from None
    return Checkpoint(path, hashlib.sha256(raw).hexdigest(), content, key)


def _select(content: Any, key: str | None, path: Path) -> dict[str, Any]:
    """Content of a file, with the selected weights as `state_dict`. Raises ValueError that completes the sentence
    "FILE ...".

    key: that of the state dict, if the user gives one. The other content of the file is then left out, as it may belong
    to other weights.
    """
    found = formats.weights_in(content)
    if key is not None:
        if key not in found:
            raise ValueError(f"holds no state_dict {key}: {_choice(found, path) or _without_weights(content)}")
        return {"state_dict": found[key]}
    wrapped = {name: weights for name, weights in found.items() if set(name.split(".")) <= set(WRAPPER_KEYS)}
    if len(wrapped) > 1:
        raise ValueError(f"holds several state_dicts: {_choice(wrapped, path)}")
    if not wrapped:
        raise ValueError(f"holds no state_dict: {_choice(found, path) or _without_weights(content)}")
    return {**content, "state_dict": next(iter(wrapped.values()))}


def _choice(found: Mapping[str, Any], path: Path) -> str:
    """Hint that lists the state dicts of a file as FILE#KEY; empty if it has none."""
    return f"choose one as {' or '.join(f'{path}#{key}' for key in list(found)[:10])}" if found else ""


def _without_weights(content: Any) -> str:
    contents = keys_of(content) if isinstance(content, dict) else f"a {type(content).__name__}"
    return f"it holds {contents}; torch.save(network.state_dict(), ...) makes a checkpoint"


def check_exists(name: str | Path, role: str) -> None:
    """Raise UserError, as `load` does, if the file does not exist."""
    path, _ = files.split_key(name)
    if not path.exists():
        raise UserError(f"{role}: {path} does not exist (current directory: {Path.cwd()}); train it first, or give "
                        "another file")


def load_weights(network: nn.Module, checkpoint: Checkpoint, role: str = "checkpoint") -> None:
    """Copy the weights of a checkpoint into a network of the same architecture.

    Raises UserError that names the file, the first name that differs and both shapes.
    """
    wanted = network.state_dict()
    found = _named_as(wanted, checkpoint.state_dict)
    if misfit := _misfit(found, wanted):
        raise UserError(f"{role}: {checkpoint.path} does not fit: {misfit}")
    network.load_state_dict(found)


def _named_as(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights renamed to the names of the network, if these differ only in the prefixes of wrappers.

    Missing batch counters of batch norm are 0: torch before 0.4.1 had none.
    """
    ours = {_unwrapped(name): name for name in wanted}
    named = {ours.get(_unwrapped(name), name): tensor for name, tensor in found.items()}
    if len(ours) < len(wanted) or len(named) < len(found):  # names differ only in these prefixes: rename nothing
        named = dict(found)
    if _WRAPPER_COUNTER not in wanted:
        named.pop(_WRAPPER_COUNTER, None)
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            named.setdefault(name, torch.zeros_like(tensor))
    return named


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """First reason why a state dict cannot be loaded into the network; empty if there is none."""
    for name, tensor in wanted.items():
        if name not in found:
            instead = "".join([f", but {other}" for other in found if other not in wanted][:1])
            return f"it has no {name} (shape {tuple(tensor.shape)}){instead}; is it another architecture?"
        theirs, ours = tuple(found[name].shape), tuple(tensor.shape)
        if theirs != ours:
            reason = f"{name} has shape {theirs} in the file and {ours} in the network"
            if _is_classifier(name, wanted) and theirs[1:] == ours[1:]:
                return reason + f": the file has {theirs[0]} classes, the data set has {ours[0]}"
            return reason + ": is it another architecture, or another num_channels?"
        if tensor.is_floating_point() and not _is_plain(found[name]):
            return f"{name} is a tensor of {found[name].dtype}, {found[name].layout}: quantized, complex, sparse " \
                "and meta tensors are not loaded"
    for name, tensor in found.items():
        if name not in wanted:
            return f"{name} (shape {tuple(tensor.shape)}) does not exist in this network; is it another architecture?"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a dense floating-point tensor with data."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _is_classifier(name: str, state_dict: Mapping[str, Tensor]) -> bool:
    matrices = [other for other, tensor in state_dict.items() if tensor.dim() >= 2]
    return matrices[-1:] == [name]
