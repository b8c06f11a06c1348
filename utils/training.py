"""Interface between run and training: the learner, which trains for one epoch, and the progress."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from utils.results import Row


@dataclass
class Progress:
    """Progress of a run. `history`: reproducible metrics, one row per epoch; `timings`: one row of times per epoch."""

    history: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> Row:
        """Row of the epoch with the highest accuracy on the held-out images or, without any, on the test images; the
        later one in a tie."""
        key = "validation_accuracy" if "validation_accuracy" in self.history[-1] else "test_accuracy"
        return max(self.history, key=lambda row: (row[key], row["epoch"]))

    def add(self, row: Row, *, images_per_second: float, seconds: float) -> None:
        """Append an epoch: metrics, training speed, and time of training and evaluation in seconds."""
        self.history.append(row)
        self.timings.append({"images_per_second": images_per_second, "seconds": seconds})

    @property
    def images_per_second(self) -> float:
        """Training speed, median over the epochs."""
        return statistics.median(row["images_per_second"] for row in self.timings)


class Learner(Protocol):
    """Interface of an object that trains a network for one epoch per call."""

    num_images: int  # training images per epoch

    def setup(self, log: Callable[[str], None]) -> None:
        """Prepare for training; called once, before the first epoch of this process. log: writes a line to the log."""

    def epoch(self, epoch: int, title: str) -> Row:
        """Train for one epoch, counted from 0. Returns the values to log, including `learning_rate`. title: text of the
        progress bar. Raises UserError if a loss or gradient is not finite.
        """
        ...

    def first_images(self) -> dict[str, Tensor]:
        """Images to log before the first epoch, (B, 3, H, W) in [0, 1] by name."""
        return {}

    def epoch_images(self) -> dict[str, Tensor]:
        """Images to log after an epoch, (B, 3, H, W) in [0, 1] by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint besides the weights of the network: `optim_dict` and further entries."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`, which also has `epoch`, the number of epochs done."""
