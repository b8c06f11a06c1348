"""What a run knows of training: the learner, which trains for an epoch, and the progress so far."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from utils.results import Row


@dataclass
class Progress:
    """What a run has done so far. `history`: a row per epoch, reproducible; `timings`: the same of the clock."""

    history: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> Row:
        """The row of the epoch with the highest accuracy on the held-out images, or, without any, on the test
        images; the later one on a tie."""
        key = "validation_accuracy" if "validation_accuracy" in self.history[-1] else "test_accuracy"
        return max(self.history, key=lambda row: (row[key], row["epoch"]))

    def add(self, row: Row, *, images_per_second: float, seconds: float) -> None:
        """Append an epoch: its row, its training speed, and the time of training and evaluation."""
        self.history.append(row)
        self.timings.append({"images_per_second": images_per_second, "seconds": seconds})

    @property
    def images_per_second(self) -> float:
        """Training speed: the median epoch's."""
        return statistics.median(row["images_per_second"] for row in self.timings)


class Learner(Protocol):
    """What trains a network, an epoch at a time."""

    num_images: int  # that an epoch trains on

    def setup(self, log: Callable[[str], None]) -> None:
        """Called once, before the first epoch of this process. `log` writes to the log."""

    def epoch(self, epoch: int, title: str) -> Row:
        """Train for an epoch, counted from 0 and called `title`. What to log of it, `learning_rate` among it.

        Raises UserError when a loss or gradient is not finite.
        """
        ...

    def first_images(self) -> dict[str, Tensor]:
        """Images to log before the first epoch, (B, 3, H, W) in [0, 1] by name."""
        return {}

    def epoch_images(self) -> dict[str, Tensor]:
        """Images to log after an epoch, (B, 3, H, W) in [0, 1] by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights of the network: `optim_dict`, and what else changes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; `state` has `epoch`, the epochs done, beside its keys."""
