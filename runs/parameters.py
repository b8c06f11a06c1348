"""Print the keys of params.json as a Markdown table or a JSON schema.

    python -m utils.params              # table of docs/parameters.md
    python -m utils.params kd           # JSON schema of a stage: scratch, nasty, kd, poisoned, datafree, audit
    python -m utils.params kd dkd       # JSON schema of one attack, defense or data-free method
"""
from __future__ import annotations

import argparse
import json
from typing import Any

from runs.stages import STAGES
from utils.cli import main
from utils.errors import UserError
from utils.params.stage import Stage


def markdown_table() -> str:
    """Parameters of all stages as a Markdown table."""
    rows: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # (stage, method) pairs by equal table row
    for stage in STAGES.values():
        for method, kind in stage.all_params().items():
            schemas = kind.model_json_schema()["properties"]
            for name, field in kind.model_fields.items():
                default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
                row = name, _type_name(schemas[name]), default, field.description or ""
                rows.setdefault(row, []).append((stage.name, method))
    lines = ["| key | type | default | stage | what |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(name for name, *_ in rows))
    for (name, type_name, default, what), owners in sorted(rows.items(), key=lambda row: names.index(row[0][0])):
        what = what.replace("|", "\\|")
        lines.append(f"| `{name}` | {type_name} | {default} | {_owners(owners)} | {what} |")
    return "\n".join(lines)


def _owners(owners: list[tuple[str, str]]) -> str:
    """Stages of a key, with the methods in parentheses if only some of them have it."""
    texts = []
    for stage in STAGES.values():
        methods = [method for name, method in owners if name == stage.name]
        if methods:
            texts.append(stage.name if len(methods) == len(stage.all_params()) else
                         f"{stage.name} ({', '.join(methods)})")
    return "all" if texts == list(STAGES) else ", ".join(texts)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " / ".join(f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in schema["enum"]
                          if not isinstance(choice, bool))
    if "anyOf" in schema:  # an optional value: its type if not null
        return " or ".join(_type_name(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "$ref" in schema:  # an object with keys of its own
        return "object"
    names = {"integer": "int", "number": "float", "string": "string", "object": "object"}
    return f"list of {_type_name(schema['items'])}" if schema["type"] == "array" else names[schema["type"]]


def schema(stage: Stage, method: str | None = None) -> dict[str, Any]:
    """JSON schema of a stage's params.json, or of one method."""
    kinds = stage.all_params()
    schemas = [kinds[method]] if method else list(kinds.values())
    found = [kind.model_json_schema() for kind in schemas]
    return found[0] if len(found) == 1 else {"title": stage.script, "anyOf": found}


def show() -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.params", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", metavar="STAGE",
                        help=f"print the JSON schema of a stage: {', '.join(STAGES)} (default: table of all)")
    parser.add_argument("method", nargs="?", metavar="METHOD", help="only that of an attack, defense or method")
    arguments = parser.parse_args()
    if not arguments.stage:
        print(markdown_table())
        return
    if arguments.stage not in STAGES:
        raise UserError(f"unknown stage {arguments.stage!r}: choose from {', '.join(STAGES)}")
    known = STAGES[arguments.stage].methods
    if arguments.method and arguments.method not in known:
        raise UserError(f"unknown method {arguments.method!r}: " + (f"choose from {', '.join(known)}" if known else
                                                     f"{arguments.stage} has no methods to choose from"))
    print(json.dumps(schema(STAGES[arguments.stage], arguments.method), indent=2))


if __name__ == "__main__":
    main(show)
