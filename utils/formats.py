"""File formats of weights, parsed without executing anything: `torch.save` and safetensors."""
from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import file_kinds


def parse(raw: bytes, path: Path) -> Any:
    """Parse a file of `torch.save` (tensors, plain containers, NumPy scalars) or safetensors; tensors on the CPU.

    path: the file, for the commands in error messages. Raises ValueError whose text completes the sentence
    "FILE cannot be loaded: ...".
    """
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") < 1 << 27:  # the length of its JSON header
        return _parse_safetensors(raw)
    if file_kinds.is_torchscript(raw):  # older releases of torch run it, even with weights_only
        raise ValueError(file_kinds.describe(raw, path, unknown=False))
    try:
        with warnings.catch_warnings(), _numbers_of_numpy():
            warnings.simplefilter("ignore")  # torch warns about pickles that it refuses
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged or refused files
        unknown = " GLOBAL " in str(error)  # in torch's message for a class or function that it does not load
        raise ValueError(file_kinds.describe(raw, path, unknown)) from error


def is_weights(content: Any) -> bool:
    """Whether the content is a state dict, tensors by name."""
    return isinstance(content, dict) and bool(content) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def weights_in(content: Any, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """State dicts within a dict, up to two levels deep, by key: `model`, `model.state_dict`."""
    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if is_weights(value):
            found[f"{prefix}{key}"] = value
        elif not prefix:
            found |= weights_in(value, f"{key}.")
    return found


def _parse_safetensors(raw: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(raw)
    except SafetensorError:
        raise ValueError("it is a truncated or damaged safetensors file") from None


# NumPy scalars in pickles. NumPy's own functions would rebuild any data type; these rebuild only numbers and text.

class _Dtype:
    """Stand-in for `numpy.dtype`."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSU":
            raise ValueError(f"{code} is not a data type of numbers or text")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _scalar(dtype: _Dtype, data: bytes) -> np.generic:
    """Stand-in for `numpy.core.multiarray.scalar`."""
    return np.frombuffer(data, dtype.dtype, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, which protocol 2 uses for bytes."""
    return text.encode("latin1")


def _under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function under the name that pickles use."""
    def renamed(*arguments: Any) -> Any:
        return function(*arguments)

    renamed.__module__, _, renamed.__name__ = name.rpartition(".")
    renamed.__qualname__ = renamed.__name__
    return renamed


_Dtype.__module__, _Dtype.__name__, _Dtype.__qualname__ = "numpy", "dtype", "dtype"
_SAFE: list[Any] = [_Dtype, _under("_codecs.encode", _encode),  # torch 2.4 does not load bytes itself
                    _under("numpy.core.multiarray.scalar", _scalar),  # before NumPy 2
                    _under("numpy._core.multiarray.scalar", _scalar)]
_loading = threading.Lock()  # torch's list is global


@contextlib.contextmanager
def _numbers_of_numpy() -> Iterator[None]:
    """Context in which torch loads only the stand-ins above and no other registered classes.

    Not `torch.serialization.safe_globals`, which needs torch 2.5 and keeps what others registered.
    """
    with _loading:
        before = torch.serialization.get_safe_globals()
        try:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(_SAFE)
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)
