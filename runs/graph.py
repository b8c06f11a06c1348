"""Which run needs which: a run's checkpoints come from other runs' directories."""
from __future__ import annotations

import os
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from runs.directories import Run
from utils.errors import UserError


def needs(runs: Sequence[Run]) -> dict[Path, list[Path]]:
    """The directories of these runs, sources first, and for each those whose checkpoints it reads. Raises UserError
    where runs need each other in a circle, or an unfinished one a checkpoint that is not there and that none of them
    writes."""
    directories = {absolute(run.directory): run.directory for run in runs}
    graph: dict[Path, list[Path]] = {}
    for run in runs:
        graph[run.directory] = []
        for key, name in run.params.checkpoints().items():
            source = directories.get(absolute(Path(name).parent))
            if source is None and not run.finished and not os.path.exists(name):
                raise UserError(f'{run.directory}: "{key}": there is no {name}, and none of these runs writes it')
            if source is not None and source not in graph[run.directory]:
                graph[run.directory].append(source)
    try:
        return {directory: graph[directory] for directory in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        raise UserError(f"in a circle: {' needs '.join(map(str, reversed(error.args[1])))}") from None


def check_sources(runs: Sequence[Run]) -> None:
    """Raise UserError where an unfinished run needs a checkpoint that is not there and that nobody writes any more."""
    finished = {absolute(run.directory): run.directory for run in runs if run.finished}
    for run in runs:
        for key, name in run.params.checkpoints().items():
            source = finished.get(absolute(Path(name).parent))
            if source and not run.finished and not os.path.exists(name):
                raise UserError(f'{run.directory}: "{key}": there is no {name}, and {source} is finished without it '
                                "(--restart runs it again)")


def absolute(path: Path) -> Path:
    """Without `..`, and links as they are."""
    return Path(os.path.abspath(path))
