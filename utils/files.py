"""Files that are whole at every moment: what is written appears in one step or not at all."""
from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file. A kill, a crash or a full disk leaves the previous one there whole. Raises OSError."""
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """As `write`, in UTF-8."""
    write(path, text.encode())


def copy(source: Path, destination: Path) -> None:
    """As `write`. No link: who edits one of the two files must not edit the other."""
    write(destination, source.read_bytes())


def sha256(path: Path) -> str:
    """The hash of a file, as `Checkpoint.sha256` has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
