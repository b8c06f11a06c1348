"""Files that are whole at every moment, as what is written appears in one step or not at all; and JSON of anyone."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which names the file and the place, for whatever else is there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        json.dumps(values, ensure_ascii=False).encode()  # half a character could not be written again
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeError:
        raise UserError(f"{path} is not a text file") from None
    except json.JSONDecodeError as error:
        if error.msg == "Expecting ',' delimiter":  # missing where the value before ends, not where the next key is
            error = json.JSONDecodeError("Expecting ',' after this", error.doc, len(error.doc[:error.pos].rstrip()))
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, no end of brackets
        raise UserError(f"{path}: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, {{\"key\": value, ...}}")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {json.dumps(key)} appears twice")
    return dict(pairs)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
