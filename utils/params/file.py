"""Read and validate a params.json."""
from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.errors import UserError
from utils.files import read_json
from utils.params.base import MethodParams, Params
from utils.params.stage import Stage


def load_params(path: Path, stage: Stage, overrides: dict[str, Any] | None = None) -> Any:
    """Read and validate the params.json of a stage; `overrides` (from the command line) replace its values.

    Raises UserError with each invalid key, its value and the allowed values.
    """
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file: --save_path must be a directory with a params.json")
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --save_path must be a directory with a params.json") from None
    return check_params(values, path, stage, overrides or {})


def check_params(values: dict[str, Any], path: Path, stage: Stage, overrides: dict[str, Any]) -> Any:
    """Validate the content of a params.json, see `load_params`. path: for messages."""
    try:
        kind = stage.params_of(values | overrides)
    except UserError as error:
        raise UserError(f"{'--set' if stage.key in overrides else path}: {error}") from None
    try:
        return kind.model_validate(values | overrides)
    except ValidationError as error:
        other = next((other.script for other in Stage.ALL.values() if _fits(values, other)), kind.script)
        file = str(path) if other == kind.script else f"{path} is for {other}, not for {kind.script}"
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            place = "--set" if problem["loc"] and problem["loc"][0] in overrides else file
            problems.setdefault(place, []).append(describe_problem(problem, kind))
        raise UserError("; ".join(f"{place}: {'; '.join(texts)}" for place, texts in problems.items())) from None


def _fits(values: dict[str, Any], stage: Stage) -> bool:
    try:
        stage.params_of(values).model_validate(values)
    except (UserError, ValidationError):
        return False
    return True


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Parse the `KEY=VALUE` arguments of --set. A value is JSON or, if it is not valid JSON, a string. Raises UserError
    for other arguments and for a repeated key."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=VALUE, not {assignment!r}")
        if key in overrides:
            raise UserError(f"--set gives {key} twice")
        overrides[key] = _value(text)
    return overrides


def _value(text: str) -> Any:
    """Value of a text: JSON or, if it is not valid JSON, a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def changed_keys(old: dict[str, Any], new: Params) -> list[str]:
    """Parameters in which two runs differ, as `key (old -> new)`, without those that do not affect results."""
    defaults = {key: field.get_default() for key, field in type(new).model_fields.items() if not field.is_required()}
    then, now = defaults | new.with_new_names(old), new.model_dump()  # keys newer than the run have their defaults
    return [f"{key} ({json.dumps(then.get(key))} -> {json.dumps(now.get(key))})"
            for key in {**now, **then}
            if key not in new.changeable and then.get(key) != now.get(key)]


def describe_problem(problem: Any, kind: type[MethodParams]) -> str:
    """Format an error of pydantic as one sentence: the key, its value and the allowed values."""
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    key = str(problem["loc"][0])
    if len(problem["loc"]) > 2 and problem["type"] in ("extra_forbidden", "missing"):  # in an object of a list
        place = f'"{key}"' + "".join(f"[{part}]" for part in problem["loc"][1:-1])
        return f'{place} has {"no" if problem["type"] == "missing" else "the unknown key"} "{problem["loc"][-1]}"'
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{_hint(key, kind)}'
    if problem["type"] == "missing":
        return f'the key "{key}" is missing'
    message = problem["msg"].replace("Input should", "should")
    if problem["type"] == "literal_error":  # as in JSON
        message = message.replace("False", "0").replace("True", "1")
    if problem["type"] == "list_type":
        message += f", such as {_as_list(problem['input'])}"
    inside = "".join(f"[{part}]" for part in problem["loc"][1:])
    return f'"{key}"{inside} is {json.dumps(problem["input"])}: {message}'


def _as_list(given: Any) -> str:
    """The list that was meant by `3,4`, `[label]` or a single value, as JSON."""
    values = [_value(word.strip()) for word in given.strip("[] ").split(",")] if isinstance(given, str) else [given]
    return json.dumps(values, separators=(",", ":"))


def _hint(key: str, kind: type[MethodParams]) -> str:
    owners = dict.fromkeys(stage.script if stage.script != getattr(kind, "script", "") else f'"{stage.key}" "{method}"'
                           for stage in Stage.ALL.values() for method, other in stage.all_params().items()
                           if key in other.model_fields)
    if owners:
        return f" (it is a key of {' and '.join(owners)})"
    near = difflib.get_close_matches(key, kind.model_fields, n=1)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (known: {', '.join(kind.model_fields)})"
