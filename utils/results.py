"""results.json, the record of a finished run."""
from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from utils import files
from utils.errors import UserError

Row = dict[str, float]


@dataclass(frozen=True)
class Results:
    """Setup, inputs and metrics of a finished run. Rates in percent, losses in nats, times in seconds."""

    stage: str  # the script
    best: Row  # epoch of the highest accuracy on the held-out images or, without any, on the test images
    last: Row
    params: dict[str, Any]  # effective parameters, defaults included
    seed: int = 0
    wall_time_seconds: float = 0.0  # training and evaluation, without start-up
    images_per_second: float = 0.0  # training speed of the median epoch
    device: str = ""
    processes: int = 1
    precision: str = ""
    set: dict[str, Any] = field(default_factory=dict)  # parameters of the command line
    versions: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)  # parameters compile, cuda_graph, teacher_cache
    sessions: list[dict[str, Any]] = field(default_factory=list)  # records of the calls of the run
    data: dict[str, Any] = field(default_factory=dict)  # record of the data set, see `utils.data_record`
    num_parameters: int = 0
    checkpoints_read: dict[str, Any] = field(default_factory=dict)  # path and SHA-256 by role
    evaluated_before: dict[str, Row] = field(default_factory=dict)  # metrics of the loaded networks
    queries: dict[str, int] = field(default_factory=dict)  # images that a thief sent to a network, by role
    details: dict[str, Any] = field(default_factory=dict)  # further entries of the stage
    finished: str = ""  # local time

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises OSError."""
        files.write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results | None:
        """Read a record; None if the file does not exist. Raises UserError if it is damaged."""
        try:
            content = files.read_json(path)
        except FileNotFoundError:
            return None
        for name in ("best", "last"):
            row = content.get(name)
            if not isinstance(row, dict) or not all(is_number(row.get(key)) for key in ("epoch", "test_accuracy")):
                raise UserError(f"{path} has no accuracy of the {name} epoch")
        if not isinstance(content.get("stage"), str) or not isinstance(content.get("params"), dict):
            raise UserError(f"{path} has no stage or no params")
        known = {each.name: each for each in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items()
                      if name in known and _fits(value, known[name])})


def interface_role(role: str, answers: str) -> str:
    """Key in `evaluated_before` of a frozen network behind an interface."""
    return f"{role} as it answers ({answers})"


def _fits(value: Any, entry: dataclasses.Field) -> bool:
    """Whether an entry has the type of its default; entries of another type count as missing."""
    if entry.default_factory is not dataclasses.MISSING:
        return isinstance(value, entry.default_factory)  # type: ignore[arg-type]
    return entry.default is dataclasses.MISSING or isinstance(value, int | float | str)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a JSON file is a usable number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
