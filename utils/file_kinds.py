"""Diagnosis of files that cannot be loaded as a checkpoint, with a command to convert them. Executes no code."""
from __future__ import annotations

import io
import json
import pickle
import shlex
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

# Usual keys of the weights in a dict saved by `torch.save`.
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema")

_BINARY = (  # offset, bytes there, description
    (0, b"\x1f\x8b", "it is compressed with gzip: `gunzip -c {path} > unpacked.tar` unpacks it"),
    (257, b"ustar", "it is a tar archive: `tar -xf {path}` unpacks it"),
    (0, b"\x89HDF", "it is an HDF5 file, such as Keras writes, not a checkpoint of PyTorch"),
    (0, b"\x93NUMPY", "it is a NumPy array, not a checkpoint of PyTorch"),
)
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles that torch.save wrote before torch 1.6


def describe(raw: bytes, path: Path, unknown: bool) -> str:
    """Describe a file and the remedy: "it is ...".

    path: the file, for the command. unknown: torch found a class in the pickle that it does not load.
    """
    for offset, magic, description in _BINARY:
        if raw[offset:offset + len(magic)] == magic:
            return description.format(path=shlex.quote(str(path)))
    return _text(raw, path) or _archive(raw, path) or _pickle(raw, path, unknown) or \
        "it is truncated or not a checkpoint"


def keys_of(content: dict[Any, Any], limit: int = 10) -> str:
    """List the keys of a dict for a message: `keys: epoch, model`."""
    names = ", ".join(map(str, list(content)[:limit]))
    return f"keys: {names}" + f" and {len(content) - limit} more" * (len(content) > limit)


def _text(raw: bytes, path: Path) -> str:
    head = raw[:1024]
    if not head or any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head):
        return ""
    if head.startswith(b"version https://git-lfs"):
        folder = shlex.quote(str(path.parent))
        return f"it is a Git LFS pointer, not the file itself: `git -C {folder} lfs pull` fetches it"
    if b"<html" in head.lower() or b"<!doctype html" in head.lower():
        return "it is an HTML page, such as the login or error page of a web site: download the file itself " \
               f"(`curl -L -o {shlex.quote(str(path))} URL`)"
    first = head.decode(errors="replace").strip().partition("\n")[0]
    return f"it is a text file that begins with {first[:60]!r}, not a checkpoint"


def is_torchscript(raw: bytes) -> bool:
    return "constants.pkl" in _archived_names(raw)


def _archived_names(raw: bytes) -> list[str]:
    """Names of the files in a ZIP archive, without its top folder; none if it is not one."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _archive(raw: bytes, path: Path) -> str:
    names = _archived_names(raw)
    if not names:
        return ""
    if is_torchscript(raw):
        weights = 'torch.jit.load(FILE, map_location="cpu").state_dict()'
        return f"it is a TorchScript program, not a state_dict; {_conversion(weights, path)}"
    if "archive_format" in names:
        return "it is a program of torch.export, not a state_dict; " + \
               _conversion("torch.export.load(FILE).state_dict", path)
    return "" if "data.pkl" in names else f"it is a ZIP archive: `unzip {shlex.quote(str(path))}` unpacks it"


def _conversion(weights: str, path: Path) -> str:
    """Command that saves a state dict beside the file. weights: Python expression, with FILE for the path."""
    code = weights.replace("FILE", json.dumps(str(path)))
    code = f"import pickle, torch; torch.save({code}, {json.dumps(f'{path}.weights')})"
    return f"save its weights as {path}.weights: `python -c {shlex.quote(code)}`"


def _pickle(raw: bytes, path: Path, unknown: bool) -> str:
    outline = _outline(raw)
    if outline is None or (outline.by_torch and not unknown and not _is_whole_archive(raw)):
        return ""
    content = outline.content
    plain_dict = type(content) in (dict, OrderedDict) and not _is_state_dict(content)
    details = "; ".join(filter(None, (", ".join(outline.classes[:3]), keys_of(content) if plain_dict else "")))
    details = f" ({details})" if details else ""
    if isinstance(content, _Object):
        whole = "whole module" if "_modules" in content else "whole object"
        kind = f"it is a pickle of a {whole}{details}, not a state_dict"
    elif outline.by_torch:
        kind = f"it holds more than tensors and plain values{details}"
    else:
        kind = f"it is a plain pickle{details}, not a checkpoint of torch.save"
    weights = _weights(content)
    if weights is None:
        return f"{kind}, and is not executed; torch.save(network.state_dict(), ...) makes a checkpoint"
    load = 'torch.load(FILE, map_location="cpu", weights_only=False)' if outline.by_torch else \
        'pickle.load(open(FILE, "rb"))'
    return f"{kind}, and is not executed; if you trust its author, execute it and {_conversion(load + weights, path)}"


def _is_whole_archive(raw: bytes) -> bool:
    """Whether the bytes are an undamaged ZIP archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _weights(content: Any) -> str | None:
    """Python suffix that selects the state dict of a loaded object, such as `["model"]`; None if there is none."""
    if isinstance(content, _Object):
        return ".state_dict()" if "_modules" in content else None  # an attribute of every nn.Module
    if _is_state_dict(content):
        return ""
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    for key in sorted(keys, key=lambda key: key not in WRAPPER_KEYS):  # those first
        weights = _weights(content[key]) if isinstance(content[key], _Object) or _is_state_dict(content[key]) else None
        if weights is not None:
            return f"[{json.dumps(key)}]{weights}"
    return None


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(value, _Tensor) for value in content.values())


class Outline(NamedTuple):
    """Content of a pickle with stand-ins for objects and tensors, their class names, and whether torch wrote it."""

    content: Any
    classes: list[str]
    by_torch: bool


def _outline(raw: bytes) -> Outline | None:
    """Outline of a file of `torch.save` or `pickle.dump`; None for other or damaged files."""
    try:
        if raw.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                unpickler = _Unpickler(io.BytesIO(archive.read(name)))
            return Outline(unpickler.load(), unpickler.classes, by_torch=True)
        if not raw.startswith(b"\x80"):
            return None
        unpickler = _Unpickler(io.BytesIO(raw))
        content = unpickler.load()
        by_torch = content == _TORCH_MAGIC
        if by_torch:
            _, _, content = (unpickler.load() for _ in range(3))  # version, sizes of integers, content
        return Outline(content, unpickler.classes, by_torch)
    except Exception:  # damaged pickles raise nearly anything
        return None


class _Object(dict):
    """Stand-in for an object of any class: its attributes without its code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Object:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})

    def append(self, item: Any) -> None:
        """Ignore the items of a list or set."""

    add = extend = append
    __hash__ = object.__hash__  # type: ignore[assignment]  # hashable, for members of a set


class _Tensor(_Object):
    """Stand-in for a tensor."""


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces every class and function by a stand-in, so that no code is imported or run."""

    # Modules and names that tensors, numbers and plain containers consist of.
    PLAIN = frozenset({"torch", "torch._utils", "torch.storage", "torch.nn.parameter", "torch._tensor",
                       "builtins.set", "__builtin__.set", "_codecs.encode", "numpy.dtype",
                       "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"})

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.classes: list[str] = []

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if not {module, f"{module}.{name}"} & self.PLAIN and f"{module}.{name}" not in self.classes:
            self.classes.append(f"{module}.{name}")
        return type(f"{module}.{name}", (_Tensor if module == "torch._utils" else _Object,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Class of a network (torch.save before 1.6); None for the storage of a tensor."""
        return pid[1] if pid[0] == "module" else None
