"""Atomic writes, hashing, and JSON parsing with readable errors."""
from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from utils.errors import UserError


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: a kill, a crash or a full disk leaves the previous file intact. Raises OSError."""
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
    """Write text atomically as UTF-8. Bytes of file names that are not UTF-8 are escaped: `\\udcb9`."""
    write(path, text.encode(errors="backslashreplace"))


def copy(source: Path, destination: Path) -> None:
    """Copy a file atomically. Not a link, so that the copies can be edited separately."""
    write(destination, source.read_bytes())


def split_key(name: str | Path) -> tuple[Path, str | None]:
    """Split `FILE#KEY` (one of several state dicts of a checkpoint) into file and key. The key is None if `name` is an
    existing file or FILE does not exist."""
    file, _, key = str(name).rpartition("#")
    if file and key and "/" not in key and not Path(name).exists() and Path(file).exists():
        return Path(file), key
    return Path(name), None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file, UTF-8 (with or without byte order mark) or UTF-16.

    Raises FileNotFoundError, and UserError that names the file and the problem if it is no JSON object.
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
        raise UserError(f"{path} has half a surrogate pair (\\ud800 to \\udfff): remove it") from None
    except RecursionError:
        raise UserError(f"{path}: brackets are nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Expecting ',' delimiter":  # report the end of the previous value, not the next key
            error = json.JSONDecodeError("Expecting ',' after this", error.doc, len(error.doc[:error.pos].rstrip()))
        place = len(error.doc[:error.pos].rstrip(", \t\r\n"))  # Python 3.13 points at the comma, others behind it
        if re.match(r"\s*,\s*[]}]", error.doc[place:]):
            error = json.JSONDecodeError("remove this comma", error.doc, error.doc.index(",", place))
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except ValueError:  # Python limits integers to 4300 digits
        raise UserError(f"{path}: a number has too many digits") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, {{\"key\": value, ...}}")
    return values
