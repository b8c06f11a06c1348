"""Read the directories of runs, finished or not. Unreadable files give a warning, not an error."""
from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runs.stages import recorded_params, stage_of, stage_of_script
from utils.errors import UserError
from utils.files import read_json
from utils.params import Params, Stage, changed_keys, check_params
from utils.results import Results

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """Run directory, a directory with a params.json."""

    directory: Path
    params: Params  # of the finished run or, if unfinished, of params.json
    results: Results | None = None  # of a finished run
    history: list[Row] = field(default_factory=list)  # one row per epoch
    stale: tuple[str, ...] = ()  # changes of params.json since the run, as `key (old -> new)`

    @property
    def finished(self) -> bool:
        return self.results is not None

    @property
    def command(self) -> str:
        return f"python {self.params.script} --save_path {shlex.quote(str(self.directory))}"

    @property
    def experiment(self) -> Path:
        return experiment(self.directory)


def is_seed(directory: Path) -> bool:
    """Whether a directory, `seedN`, is one seed of the experiment in its parent."""
    return re.fullmatch(r"seed\d+", directory.name) is not None


def experiment(directory: Path) -> Path:
    """Directory that all seeds of an experiment share: `cnn` for `cnn` and `cnn/seed1`."""
    return directory.parent if is_seed(directory) else directory


def find(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All runs in and below directories, sorted by path, and a warning for each path that is missing or unreadable."""
    runs: dict[Path, Run] = {}
    warnings = []
    for root in roots:
        if not root.is_dir():
            warnings.append(f"{root}: " + ("is no directory" if root.exists() else "does not exist"))
            continue
        files = _files(root)
        if not files:
            warnings.append(f"{root}: no params.json in it or below it")
        for file in files:
            if file.parent.resolve() in runs:
                continue
            try:
                runs[file.parent.resolve()] = _read(file.parent, warnings)
            except (UserError, OSError) as error:
                warnings.append(f"left out: {error}")
    return sorted(runs.values(), key=lambda run: run.directory), warnings


def unreadable(roots: Iterable[Path], runs: Iterable[Run]) -> list[Path]:
    """Directories with a params.json in and below `roots` that are not among `runs`, the result of `find`."""
    found = {run.directory.resolve() for run in runs}
    directories = {file.parent.resolve(): file.parent for root in roots for file in _files(root)}
    return sorted(path for resolved, path in directories.items() if resolved not in found)


def _files(root: Path) -> list[Path]:
    """All params.json in and below a directory except those of audits, whose runs lie below."""
    return [file for file in sorted(root.rglob("params.json")) if not is_audit(file)]


def is_audit(file: Path) -> bool:
    """Whether a params.json is that of an audit, which has the key `checkpoint`."""
    try:
        return "checkpoint" in read_json(file)
    except (UserError, OSError):
        return False


def _read(directory: Path, warnings: list[str]) -> Run:
    """Read a run directory. Raises UserError if its params.json is invalid."""
    file = directory / "params.json"
    values = read_json(file)
    history = _history(directory / "metrics.csv", warnings)
    try:
        results = Results.read(directory / "results.json")
        if results:
            params = recorded_params(results.stage, results.params)
            now = check_params(values, file, stage_of_script(results.stage), results.set)
            stale = changed_keys(results.params, now)
            if now.num_epochs != params.num_epochs:
                stale.append(f"num_epochs ({params.num_epochs} -> {now.num_epochs})")
            return Run(directory, params, results, history, tuple(stale))
    except ValidationError:
        warnings.append(f"{directory / 'results.json'} has other parameters than its stage: taken as unfinished")
    except (UserError, OSError) as error:
        warnings.append(f"taken as unfinished: {error}")
    return Run(directory, check_params(values, file, _checked_stage(values, file), {}), history=history)


def _checked_stage(values: dict[str, Any], file: Path) -> Stage:
    """Stage of a params.json. Raises UserError if it is none of an experiment."""
    if missing := [key for key in ("dataset", "model_name") if key not in values]:
        raise UserError(f"{file} is not of an experiment: it has no {' and no '.join(missing)}")
    return stage_of(values)


def _history(file: Path, warnings: list[str]) -> list[Row]:
    """Rows of a metrics.csv up to the first damaged one; empty if the file does not exist."""
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
        warnings.append(f"{file} is damaged after {len(rows)} rows")
    return rows
