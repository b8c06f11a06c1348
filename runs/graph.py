"""Dependencies between runs: a run may read checkpoints of other runs."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from runs.directories import Run
from utils.errors import UserError
from utils.files import split_key


def needs(runs: Sequence[Run]) -> dict[Path, list[Path]]:
    """Directories of the runs in topological order, each with the directories whose checkpoints it reads. Raises
    UserError for a cycle, and if an unfinished run needs a missing checkpoint that none of the runs writes."""
    graph: dict[Path, list[Path]] = {run.directory: [] for run in runs}
    for run, key, name, source in _reads(runs):
        if source is None and not run.finished and not split_key(name)[0].exists():
            raise UserError(f'{run.directory}: "{key}": {name} is missing, and none of these runs writes it')
        if source is not None and source.directory not in graph[run.directory]:
            graph[run.directory].append(source.directory)
    try:
        return {directory: graph[directory] for directory in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        raise UserError(f"runs in a cycle: {' needs '.join(map(str, reversed(error.args[1])))}") from None


def without(runs: Sequence[Run], unreadable: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Runs that do not depend on directories with an unreadable params.json, and for each other run a text that names
    the checkpoint it lacks.

    An unreadable directory does not matter if its run is finished and the checkpoint exists.
    """
    unread = {absolute(directory) for directory in unreadable}
    lost = {directory for directory in unread if not (directory / "results.json").exists()}

    def is_lost(source: Path) -> bool:
        directory = absolute(source.parent)
        return directory in lost or (directory in unread and not split_key(source)[0].exists())

    kept, texts = list(runs), []
    while waiting := {run.directory: source for run in kept if not run.finished
                      for source in map(Path, run.params.checkpoints().values()) if is_lost(source)}:
        texts += [f"{directory} needs {source}" for directory, source in waiting.items()]
        lost |= set(map(absolute, waiting))
        kept = [run for run in kept if run.directory not in waiting]
    return kept, texts


def check_sources(runs: Sequence[Run]) -> None:
    """Raise UserError if an unfinished run needs a missing checkpoint of a finished run."""
    for run, key, name, source in _reads(runs):
        if source is not None and source.finished and not run.finished and not split_key(name)[0].exists():
            raise UserError(f'{run.directory}: "{key}": {name} is missing, and {source.directory} is finished without '
                            "it (--restart runs it again)")


def _reads(runs: Sequence[Run]) -> Iterator[tuple[Run, str, str, Run | None]]:
    """Checkpoints that the runs read: the run, the parameter, the file, and the run that writes the file or None."""
    by_directory = {absolute(run.directory): run for run in runs}
    for run in runs:
        for key, name in run.params.checkpoints().items():
            yield run, key, name, by_directory.get(absolute(Path(name).parent))


def absolute(path: Path) -> Path:
    """Absolute path without `..`; links are not resolved."""
    return Path(os.path.abspath(path))
