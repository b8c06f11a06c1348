"""Experiments as they lie on disk: one directory each, finished or not.

Nothing that is found there stops whoever reads it: what cannot be read is remarked and left out.
"""
from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.errors import UserError
from utils.files import read_json
from utils.params import METHODS, STAGES, Params, changed_keys, check_params

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One directory with a params.json."""

    directory: Path
    params: Params  # of the finished run; else as params.json says
    results: dict[str, Any] = field(default_factory=dict)  # results.json of a finished run; else empty
    history: list[Row] = field(default_factory=list)  # a row per epoch
    stale: tuple[str, ...] = ()  # how params.json differs by now from what was run, as `key (old -> new)`

    @property
    def finished(self) -> bool:
        return bool(self.results)

    @property
    def command(self) -> str:
        return f"python {self.params.script} --save_path {shlex.quote(str(self.directory))}"

    @property
    def experiment(self) -> Path:
        return experiment(self.directory)

    def section(self, name: str) -> dict[str, Any]:
        """An object of results.json; empty where it has none of that name."""
        section = self.results.get(name)
        return section if isinstance(section, dict) else {}


def is_seed(directory: Path) -> bool:
    """Whether this is the directory of one seed of the experiment above it."""
    return re.fullmatch(r"seed\d+", directory.name) is not None


def experiment(directory: Path) -> Path:
    """The directory that all seeds share: `cnn` of `cnn` and of `cnn/seed1`."""
    return directory.parent if is_seed(directory) else directory


def find(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All runs at and below directories, by path, and a remark on each place that is none or cannot be read."""
    runs: dict[Path, Run] = {}
    remarks = []
    for root in roots:
        if not root.is_dir():
            remarks.append(f"{root}: " + ("is no directory" if root.exists() else "does not exist"))
            continue
        files = sorted(root.rglob("params.json"))
        if not files:
            remarks.append(f"{root}: no params.json in it or below it")
        for file in files:
            if file.parent.resolve() in runs:
                continue
            try:
                runs[file.parent.resolve()] = _read(file.parent, remarks)
            except (UserError, OSError) as error:
                remarks.append(f"left out: {error}")
    return sorted(runs.values(), key=lambda run: run.directory), remarks


def unreadable(roots: Iterable[Path], runs: Iterable[Run]) -> list[Path]:
    """The directories at and below these that hold a params.json but are none of the runs that `find` found there."""
    found = {run.directory.resolve() for run in runs}
    directories = {file.parent.resolve(): file.parent for root in roots for file in sorted(root.rglob("params.json"))}
    return sorted(path for resolved, path in directories.items() if resolved not in found)


def _read(directory: Path, remarks: list[str]) -> Run:
    """Raises UserError where params.json is none of ours."""
    file = directory / "params.json"
    values = read_json(file)
    history = _history(directory / "metrics.csv", remarks)
    try:
        results = _finished(directory / "results.json")
        if results:
            kind = next((kind for kind in STAGES.values() if kind.script == results.get("stage")), None)
            kind = METHODS[results["params"]["method"]] if kind in METHODS.values() else kind
            if kind is None:
                raise UserError(f"{directory / 'results.json'} is of no stage")
            params = kind.model_validate(results["params"])
            now = check_params(values, file, kind, results.get("set") if isinstance(results.get("set"), dict) else {})
            stale = changed_keys(results["params"], now)
            if now.num_epochs != params.num_epochs:
                stale.append(f"num_epochs ({params.num_epochs} -> {now.num_epochs})")
            return Run(directory, params, results, history, tuple(stale))
    except (ValidationError, KeyError, TypeError):
        remarks.append(f"{directory / 'results.json'} has other parameters than its stage reads: taken as unfinished")
    except (UserError, OSError) as error:
        remarks.append(f"taken as unfinished: {error}")
    return Run(directory, check_params(values, file, _kind(values, file), {}), history=history)


def _kind(values: dict[str, Any], file: Path) -> type[Params] | Mapping[str, type[Params]]:
    """The stage of a params.json, by the first of these keys that it has. Raises UserError where it is none of ours."""
    if missing := [key for key in ("dataset", "model_name") if key not in values]:
        raise UserError(f"{file} is not of an experiment: it has no {' and no '.join(missing)}")
    if "method" in values:
        return METHODS
    keys = {"teacher_model": "kd", "adversarial_model": "nasty", "trigger": "poisoned"}
    return STAGES[next((stage for key, stage in keys.items() if key in values), "scratch")]


def _finished(file: Path) -> dict[str, Any]:
    """A whole results.json; empty where there is none. Raises UserError where it is damaged."""
    try:
        results = read_json(file)
    except FileNotFoundError:
        return {}
    for name in ("best", "last"):
        row = results.get(name)
        if not isinstance(row, dict) or not all(number(row.get(key)) for key in ("epoch", "test_accuracy")):
            raise UserError(f"{file} has no accuracy of the {name} epoch")
    return results


def number(value: Any) -> bool:
    """Whether it is one that can be calculated with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _history(file: Path, remarks: list[str]) -> list[Row]:
    """The rows of a metrics.csv up to the first that is damaged; none where there is no such file."""
    rows: list[Row] = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:  # a spreadsheet adds a byte order mark
            for line in csv.DictReader(lines):
                row = {key: float(value) for key, value in line.items() if value}
                if not {"epoch", "test_accuracy"} <= row.keys() or None in line.values():  # None: the row is short
                    raise ValueError
                rows.append(row)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, csv.Error):
        remarks.append(f"{file} is damaged after {len(rows)} rows")
    return rows
