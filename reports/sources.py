"""Runs whose checkpoints other runs read, and the kinds of networks that follow from them."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runs.directories import Run
from runs.graph import absolute

CONTINUED = "continued"  # a normal network that starts from the weights of another normal one: a control


class Sources:
    """The runs of a report, by the checkpoints that they write."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._parts = [absolute(run.directory).parts for run in runs]
        self._by_end: dict[int, dict[tuple[str, ...], list[Run]]] = {}  # by the last directories, for each number

    def of(self, run: Run, key: str = "teacher_resume") -> Run | None:
        """Run whose checkpoint a run read, if it is among these. Directories may have been moved or copied together, so
        the nearest run that matches the path is taken."""
        path = Path(run.params.checkpoints().get(key, "")).parent
        if not path.name:
            return None
        place = absolute(path)
        like = [*self._ending_in(path.parts), *self._ending_in(place.parts)]
        return max(like, default=None, key=lambda other: (shared(run.directory, other.directory),
                                                          absolute(other.directory) == place))

    def chain(self, run: Run, key: str) -> list[Run]:
        """Run whose checkpoint a run read, the run whose checkpoint that one read, and so on; ends at a cycle."""
        found: list[Run] = []
        while (source := self.of(run, key)) and source not in found:
            found.append(source)
            run = source
        return found

    def _ending_in(self, parts: tuple[str, ...]) -> list[Run]:
        count = len(parts)
        if count not in self._by_end:
            found = self._by_end[count] = {}
            for run, own in zip(self.runs, self._parts, strict=True):
                found.setdefault(own[-count:], []).append(run)
        return self._by_end[count].get(parts, [])


def kind_of(run: Run, sources: Sources, seen: Sequence[Run] = ()) -> str:
    """`normal`, `continued`, a trained-in defense, `poisoned`, `student` or `unknown`. seen: runs that continue this
    one, directly or not.

    A network from labels that starts from a checkpoint of another run (`init_from`) is `continued` if that is a normal
    network of the same architecture on the same data set, `normal` if it is of another data set or architecture, and
    otherwise, or if that run is not in the report, `unknown`: it may have inherited a defense or a backdoor.
    """
    description = run.params.description
    if description.kind != "normal" or not starts_from_run(run):
        return description.kind or description.role
    source = sources.of(run, "init_from")
    if source is None or source in (run, *seen):  # not in the report, or a cycle of checkpoints
        return "unknown"
    if any(getattr(source.params, key) != getattr(run.params, key) for key in ("dataset", "model_name")):
        return "normal"
    return CONTINUED if kind_of(source, sources, [*seen, run]) in ("normal", CONTINUED) else "unknown"


def starts_from_run(run: Run) -> bool:
    """True if `init_from` names a checkpoint as runs write them."""
    return Path(run.params.checkpoints().get("init_from", "")).name in ("best_model.tar", "last_model.tar")


def shared(one: Path, other: Path) -> int:
    """Number of leading directories that two paths share."""
    return len(Path(os.path.commonpath([absolute(one), absolute(other)])).parts)
