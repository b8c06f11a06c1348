"""Reading and checking a params.json."""
from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from utils.errors import UserError
from utils.files import read_json
from utils.params.base import Params
from utils.params.stages import STAGES

ParamsType = TypeVar("ParamsType", bound=Params)


def load_params(path: Path, kind: type[ParamsType] | Mapping[str, type[ParamsType]],
                overrides: dict[str, Any] | None = None) -> ParamsType:
    """Read and check a params.json; `overrides`, of the command line, replace its values.

    kind: what it holds or, where that depends on its key `method`, what it holds for each method. Raises UserError that
    names each wrong key, its value and what is allowed.
    """
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file: --save_path names the directory that holds a params.json")
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --save_path names a directory that holds a params.json") from None
    return check_params(values, path, kind, overrides or {})


def check_params(values: dict[str, Any], path: Path, kind: type[ParamsType] | Mapping[str, type[ParamsType]],
                 overrides: dict[str, Any]) -> ParamsType:
    """As `load_params`, of what was read from the file."""
    if isinstance(kind, Mapping):
        method = (values | overrides).get("method")
        if not isinstance(method, str) or method not in kind:
            found = f'"method" is {json.dumps(method)}' if method is not None else 'the key "method" is missing'
            raise UserError(f"{path}: {found}: choose from {', '.join(kind)}")
        kind = kind[method]
    try:
        return kind.model_validate(values | overrides)
    except ValidationError as error:
        other = next((other.script for other in STAGES.values() if _fits(values, other)), kind.script)
        file = str(path) if other == kind.script else f"{path} is for {other}, not for {kind.script}"
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            place = "--set" if problem["loc"] and problem["loc"][0] in overrides else file
            problems.setdefault(place, []).append(_describe(problem, kind))
        raise UserError("; ".join(f"{place}: {'; '.join(texts)}" for place, texts in problems.items())) from None


def _fits(values: dict[str, Any], kind: type[Params]) -> bool:
    try:
        kind.model_validate(values)
    except ValidationError:
        return False
    return True


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` words of --set as a dict. A value is JSON; what is not JSON is a string. Raises UserError for other
    words and, as in a file, for a key that is there twice."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=VALUE, not {assignment!r}")
        if key in overrides:
            raise UserError(f"--set gives {key} twice")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def changed_keys(old: dict[str, Any], new: Params) -> list[str]:
    """The parameters in which two runs differ, as `key (old -> new)`, without those that change no result."""
    defaults = {key: field.get_default() for key, field in type(new).model_fields.items() if not field.is_required()}
    then, now = defaults | old, new.model_dump()  # a key that is newer than the old run has its default
    return [f"{key} ({json.dumps(then.get(key))} -> {json.dumps(now.get(key))})"
            for key in {**now, **then}
            if key not in new.changeable and then.get(key) != now.get(key)]


def _describe(problem: Any, kind: type[Params]) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else "?"
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{_hint(key, kind)}'
    if problem["type"] == "missing":
        return f'the key "{key}" is missing'
    message = problem["msg"].replace("Input should", "should")
    if problem["type"] == "literal_error":  # in the words of JSON
        message = message.replace("False", "0").replace("True", "1")
    if problem["type"] == "list_type":
        message += ", such as [1,2]"
    inside = "".join(f"[{part}]" for part in problem["loc"][1:])
    return f'"{key}"{inside} is {json.dumps(problem["input"])}: {message}'


def _hint(key: str, kind: type[Params]) -> str:
    owners = dict.fromkeys(other.script if other.script != kind.script else f'"method" "{name}"'
                           for name, other in STAGES.items() if key in other.model_fields)
    if owners:
        return f" ({' and '.join(owners)} would read it)"
    near = difflib.get_close_matches(key, kind.model_fields, n=1)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (known: {', '.join(kind.model_fields)})"
