"""Files: written whole or not at all, hashed, and JSON of anyone read."""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import UserError


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file. A kill, a crash or a full disk leaves the previous one there whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write`, in UTF-8. What no text holds, a byte of a file name that is not UTF-8, is escaped: `\\udcb9`."""
    write(path, text.encode(errors="backslashreplace"))


def copy(source: Path, destination: Path) -> None:
    """As `write`. No link: who edits one of the two files must not edit the other."""
    write(destination, source.read_bytes())


def split_key(name: str | Path) -> tuple[Path, str | None]:
    """`FILE#KEY`, one of several state dicts of a checkpoint, as file and key; the key is None where `name` is a file
    itself, or where there is no such FILE."""
    file, _, key = str(name).rpartition("#")
    if file and key and "/" not in key and not Path(name).exists() and Path(file).exists():
        return Path(file), key
    return Path(name), None


def sha256(path: Path) -> str:
    """The hash of a file, as `checkpoint.Checkpoint.sha256` has it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file: UTF-8 or, as Windows writes it, with a byte order mark or in UTF-16.

    Raises FileNotFoundError, and UserError that names the file for whatever else is there than one.
    """
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: the key {json.dumps(repeated)} appears twice")
        return values

    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=without_repeats)  # finds the encoding
        json.dumps(values, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8 or UTF-16") from None
    except UnicodeEncodeError:
        raise UserError(f"{path} holds half a character (\\ud800 to \\udfff), which cannot be written") from None
    except RecursionError:
        raise UserError(f"{path}: too many brackets within brackets") from None
    except json.JSONDecodeError as error:
        if error.msg == "Expecting ',' delimiter":  # missing where the value before ends, not where the next key is
            error = json.JSONDecodeError("Expecting ',' after this", error.doc, len(error.doc[:error.pos].rstrip()))
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise UserError(f"{path}: a number has too many digits") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, {{\"key\": value, ...}}")
    return values
