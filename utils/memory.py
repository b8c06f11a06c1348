"""Out-of-memory errors in one line that names the phase and the size of the failed allocation.

    with Phase("decoding the images", 'reduce "image_size"'):
        ...

Allocators fail in many ways: MemoryError (Python, numpy, Pillow), RuntimeError (torch on a CPU),
torch.cuda.OutOfMemoryError, OSError (ENOMEM), ImportError (a library that cannot be mapped). They are recognized by
their type or message. Imports no torch, since `utils.cli` uses this module.
"""
from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from utils.params import Params

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_MESSAGES = re.compile(r"out of memory|can(no|')t allocate memory|bad_alloc|_ALLOC_FAILED|can't start new thread"
                    r"|failed to map segment from shared object$", re.IGNORECASE)
_AMOUNT = re.compile(r"allocate (?:(?P<bytes>\d+) bytes|(?P<text>[\d.]+ \w*B)\b)", re.IGNORECASE)
_GPU = re.compile(r"GPU \d+ has a total capacity of .*? of which .*? is free")
_reserve = bytearray(4 << 20)  # freed when memory is short, to leave room for the error message
# Height and width in pixels below which the error does not suggest a smaller `image_size`: many networks need 32.
_MIN_IMAGE_SIZE = 32


class OutOfMemory(UserError):
    """Failed memory allocation."""

    def __init__(self, reason: str, phases: tuple[str, ...] = (), remedy: str = "") -> None:
        """phases: from the outermost to the innermost."""
        self.reason, self.phases, self.remedy = reason, phases, remedy
        where = f"{', '.join(phases)}: " if phases else ""
        super().__init__(f"{where}out of memory: {reason}" + (f"; {remedy}" if remedy else ""))

    def within(self, phase: str, remedy: str) -> OutOfMemory:
        """Add an outer phase, and its remedy if there is none yet."""
        return OutOfMemory(self.reason, (phase, *self.phases) if phase else self.phases, self.remedy or remedy)


class Phase(contextlib.ContextDecorator):
    """Context or decorator that turns allocator errors inside it into `OutOfMemory`. May be nested.

    Errors that were caused by an allocator's error count too: decoders and loaders report an unreadable file when they
    run out of memory.
    """

    def __init__(self, name: str | Callable[[], str] = "", remedy: str = "") -> None:
        """name: name of the phase, or a function that returns it after a failure. remedy: advice to save memory."""
        self.name, self.remedy = name, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        for link in _error_chain(error):
            if isinstance(link, OutOfMemory) or _is_out_of_memory(link):
                name = self.name() if callable(self.name) else self.name
                _free_memory(error)
                known = (link.reason, link.phases, link.remedy) if isinstance(link, OutOfMemory) else (_reason(link),)
                raise OutOfMemory(*known).within(name, self.remedy) from None


def reduce(params: Params, *keys: str) -> str:
    """Remedy such as `reduce "batch_size" or "image_size"`, of the given parameters that this run can reduce."""
    scalable = params.dataset.startswith("folder:") and params.image_size > _MIN_IMAGE_SIZE
    names = [f'"{key}"' for key in keys if hasattr(params, key) and (key != "image_size" or scalable)]
    return f"reduce {' or '.join(names)}" if names else ""


def _free_memory(error: BaseException | None) -> None:
    """Free the local variables of an error's frames, such as tensors, and the reserve, to make room for the message."""
    _reserve.clear()
    for link in _error_chain(error):
        traceback.clear_frames(link.__traceback__)


def _error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and the exceptions that led to it.

    The cause (`raise ... from error`) is always followed. The context (the error being handled) is followed only for
    types that decoders and loaders raise, and not after `from None` except for UserError, which always explains
    another error. A KeyError while a MemoryError is handled, for example, is a bug of its own.
    """
    seen: set[int] = set()
    while isinstance(error, Exception) and id(error) not in seen:
        seen.add(id(error))
        yield error
        if error.__cause__ is None and (isinstance(error, UserError) or (
                isinstance(error, OSError | ValueError | RuntimeError) and not error.__suppress_context__)):
            error = error.__context__
        else:
            error = error.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and bool(_MESSAGES.search(first_line(error)))


def _reason(error: BaseException) -> str:
    """Size of the failed allocation and the memory limit, if known."""
    text = first_line(error) if str(error) else "cannot allocate more"
    if amount := _AMOUNT.search(text):
        size = _size(int(amount["bytes"])) if amount["bytes"] else amount["text"].replace(". ", " ")  # numpy: `8. GiB`
        text = f"cannot allocate {size}"
    gpu = _GPU.search(str(error))
    return text + (f" ({gpu[0]})" if gpu else "" if "CUDA" in str(error) else _limit())


def _limit() -> str:
    """Limit of this process's address space, if there is one."""
    if resource is None or (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return ""
    return f" (limit of ulimit -v: {_size(limit)})"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
