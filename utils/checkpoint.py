"""Checkpoints: atomic saves, loads that execute nothing, weights checked name by name.

A checkpoint is a `torch.save` of a dict with the reference's keys `epoch` (epochs done), `state_dict` and `optim_dict`;
ours stand beside them. Anything published in that form loads, with or without a `module.` prefix, and so does a bare
state dict.
"""
from __future__ import annotations

import hashlib
import io
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import files
from utils.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a file, and which file it was."""

    path: Path
    sha256: str
    content: dict[str, Any]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        weights = self.content["state_dict"]
        # What DataParallel and torch.compile put before the names.
        return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in weights.items()}

    @property
    def source(self) -> dict[str, str]:
        """Where weights came from, for the records of a run."""
        return {"path": str(self.path), "sha256": self.sha256}


def save(content: dict[str, Any], *paths: Path) -> None:
    """Write a checkpoint, to each path in turn. A kill, a crash or a full disk leaves the previous file there whole."""
    buffer = io.BytesIO()  # so that a full disk is an OSError here and not a RuntimeError inside torch
    torch.save(content, buffer)
    for path in paths:
        files.write(path, buffer.getbuffer())


class Writer:
    """Saves checkpoints in the background, one at a time: training goes on while the disk works."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)  # a process that ends waits for it
        self._pending: Future[None] | None = None

    def save(self, content: dict[str, Any], *paths: Path) -> None:
        """As `save`, of what the content is now. Raises the error of the save before."""
        self.wait()
        self._pending = self._pool.submit(save, _copied(content), *paths)

    def wait(self) -> None:
        """Until all is on the disk. Raises the error of the last save."""
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        finally:
            del pending  # it holds the error, whose traceback holds this frame, and what hangs on it


def _copied(content: Any) -> Any:
    """The same with copies of all tensors, on the CPU, which later steps do not change."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def load(path: str | Path, role: str = "checkpoint") -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises UserError that begins with `role` and names the file.

    Weights may come from anyone, so nothing but tensors and plain containers is unpickled.
    """
    path = Path(path)
    check_exists(path, role)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{role}: cannot read {path}: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on the pickles that it refuses
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged or refused files
        reason = "it holds more than tensors and plain values, and is not executed" if _refused(error) else \
            "it is truncated or not a checkpoint"
        raise UserError(f"{role}: {path} cannot be loaded: {reason}") from None
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"state_dict": content}
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(value, Tensor)
                                                for name, value in weights.items()):
        raise UserError(f"{role}: {path} holds no state_dict: torch.save(network.state_dict(), ...) makes a checkpoint")
    return Checkpoint(path, hashlib.sha256(raw).hexdigest(), content)


def check_exists(path: str | Path, role: str) -> None:
    """Raise UserError, as `load` does, if there is no such file."""
    if not Path(path).exists():
        raise UserError(f"{role}: {path} does not exist (current directory: {Path.cwd()}); train it first, or name "
                        "another file")


def load_weights(network: nn.Module, checkpoint: Checkpoint, role: str = "checkpoint") -> None:
    """Copy the weights of a checkpoint into a network of the same architecture.

    Raises UserError that names the file, the first name that differs and both shapes.
    """
    found, wanted = checkpoint.state_dict, network.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(f"{role}: {checkpoint.path} does not fit: it has no {name} "
                            f"(shape {tuple(tensor.shape)}); is it another architecture?")
        if found[name].shape != tensor.shape:
            theirs, ours = tuple(found[name].shape), tuple(tensor.shape)
            reason = f"{name} has shape {theirs} there and {ours} here"
            if _is_classifier(name, wanted) and theirs[1:] == ours[1:]:
                reason += f": it knows {theirs[0]} classes, the data set has {ours[0]}"
            else:
                reason += ": is it another architecture, or another num_channels?"
            raise UserError(f"{role}: {checkpoint.path} does not fit: {reason}")
    for name, tensor in found.items():
        if name not in wanted:
            raise UserError(f"{role}: {checkpoint.path} does not fit: {name} (shape {tuple(tensor.shape)}) has no "
                            "place in this network; is it another architecture?")
    network.load_state_dict(found)


def _is_classifier(name: str, state_dict: dict[str, Tensor]) -> bool:
    matrices = [other for other, tensor in state_dict.items() if tensor.dim() >= 2]
    return matrices[-1:] == [name]


def _refused(error: Exception) -> bool:
    """Whether a file was a pickle of more than tensors and plain values, in the words of torch's own loader."""
    return " GLOBAL " in str(error)
