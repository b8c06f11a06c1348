"""What a params.json may say, for people and editors.

    python -m utils.params              # the table of parameters, as in the README
    python -m utils.params scratch      # JSON schema for an editor; also of the other stages and methods
"""
from __future__ import annotations

import argparse
import json
from typing import Any

from utils.cli import main
from utils.errors import UserError
from utils.params.datafree import METHODS
from utils.params.stages import STAGES


def markdown_table() -> str:
    """The parameters of all stages as the table of the README."""
    rows: dict[tuple[str, ...], list[str]] = {}  # the stages that have a key with the same type, default and meaning
    for stage, kind in STAGES.items():
        schemas = kind.model_json_schema()["properties"]
        for name, field in kind.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            row = name, _type_name(schemas[name]), default, field.description
            rows.setdefault(row, []).append(stage)
    lines = ["| key | type | default | stage | what |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(name for name, *_ in rows))
    for (name, kind, default, what), stages in sorted(rows.items(), key=lambda row: names.index(row[0][0])):
        if set(METHODS) <= set(stages) < set(STAGES):
            stages = [*(stage for stage in stages if stage not in METHODS), "data-free"]
        owners = "all" if len(stages) == len(STAGES) else ", ".join(stages)
        lines.append(f"| `{name}` | {kind} | {default} | {owners} | {what} |")
    return "\n".join(lines)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " / ".join(f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in schema["enum"]
                          if not isinstance(choice, bool))
    schema = schema.get("anyOf", [schema])[0]  # an optional value: what it is when it is not null
    names = {"integer": "int", "number": "float", "string": "string"}
    return f"list of {names[schema['items']['type']]}" if schema["type"] == "array" else names[schema["type"]]


def show() -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.params", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", metavar="STAGE",
                        help=f"the JSON schema of one: {', '.join(STAGES)} (default: the table of all)")
    stage = parser.parse_args().stage
    if stage and stage not in STAGES:
        raise UserError(f"{stage!r}: choose from {', '.join(STAGES)}, or nothing for the table")
    print(json.dumps(STAGES[stage].model_json_schema(), indent=2) if stage else markdown_table())


if __name__ == "__main__":
    main(show)
