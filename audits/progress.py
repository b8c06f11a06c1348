"""Progress of an audit, and the remaining time estimated from the finished students."""
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from runs.directories import Run
from runs.pool import Watcher
from utils.params import RecipeParams

TEST = 1 / 3  # cost of a test image (forward pass, after each epoch) relative to a training image
STARTUP = 2.0  # seconds of a run that its recorded wall time does not include


def cost(run: Run, sizes: Mapping[str, int], test_images: int) -> float:
    """Cost of a run in training images; an evaluated image counts a third. sizes: number of training images by data
    set."""
    params = run.params
    values = (getattr(params, key, None) for key in ("query_budget", "subset_size", "patches"))
    images = next(filter(None, values), None) or sizes[getattr(params, "transfer_set", None) or params.dataset]
    assert isinstance(params, RecipeParams)
    return params.num_epochs * (images + TEST * test_images)


def seconds_left(costs: dict[Path, float], finished: Sequence[Run], jobs: int) -> float | None:
    """Estimate from the speed of the finished runs; None if no run is finished."""
    records = [(run.results, costs[run.directory]) for run in finished if run.results]
    if not records:
        return None
    pace = sum(results.wall_time_seconds + STARTUP for results, _ in records) / sum(each for _, each in records)
    done = {run.directory for run in finished}
    return pace * sum(each for directory, each in costs.items() if directory not in done) / jobs


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `2.5 h`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else \
        f"{seconds / 3600:.1f} h"


class Bar(Watcher):
    """Progress bar with the remaining time; failures are printed above it. Without a terminal, one line per run."""

    def __init__(self, costs: dict[Path, float]) -> None:
        """costs: cost of each unfinished run, by directory."""
        self._costs, self._done, self._of = costs, 0, len(costs)
        self._bar = tqdm(total=sum(costs.values()), smoothing=0, leave=False, disable=not sys.stderr.isatty(),
                         bar_format="{desc} |{bar}| {percentage:.0f} %, {remaining} left", desc=f"0 of {self._of}")

    def started(self, run: Run, number: int, of: int) -> None:
        if self._bar.disable:
            super().started(run, number, of)

    def finished(self, run: Run, seconds: float) -> None:
        if self._bar.disable:
            super().finished(run, seconds)
        self._done += 1
        self._bar.set_description_str(f"{self._done} of {self._of} students", refresh=False)
        self._bar.update(self._costs[run.directory])

    def failed(self, run: Run, error: str) -> None:
        with tqdm.external_write_mode():
            super().failed(run, error)

    def close(self) -> None:
        self._bar.close()
