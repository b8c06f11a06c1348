"""The one training loop: epochs, evaluation after each, when to save.

It knows a method only as a `Learner`, which trains for an epoch and returns what is to be logged.
"""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils import distributed, memory, seeds
from utils.errors import UserError
from utils.params import Params

Row = dict[str, float]


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

    @property
    def images_per_second(self) -> float:
        """Training speed: the median epoch's."""
        return statistics.median(row["images_per_second"] for row in self.timings)


class Learner(Protocol):
    """What trains a network, an epoch at a time."""

    images: int  # that an epoch trains on

    def begin(self, say: Callable[[str], None]) -> None:
        """Called once, before the first epoch of this process. `say` writes to the log."""

    def epoch(self, epoch: int, title: str) -> Row:
        """Train for an epoch, counted from 0 and called `title`. What to log of it, `learning_rate` among it.

        Raises UserError when a loss or gradient is not finite.
        """

    def pictures(self) -> dict[str, Tensor]:
        """What there is to look at now, (B, 3, H, W) in [0, 1] by name."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights of the network: `optim_dict`, and what else changes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. `state` has more keys than its own."""


def train(network: nn.Module, learner: Learner, evaluate_all: Callable[[nn.Module], Row], params: Params,
          progress: Progress, end_of_epoch: Callable[[], None]) -> None:
    """Run the epochs that `progress` lacks and evaluate after each.

    `evaluate_all` returns what the network is worth, named; `end_of_epoch` saves and logs. Raises UserError when a
    number is not finite or memory is short, before `end_of_epoch`: what was saved stays good.
    """
    smaller = memory.reduce(params, "batch_size", "synthesis_batch_size", "image_size")
    for epoch in range(progress.epoch, params.num_epochs):
        start = time.perf_counter()
        torch.manual_seed(seeds.derive_seed(params.seed, "dropout", epoch, distributed.rank()))
        with memory.Phase(f"epoch {epoch + 1}", f"{smaller}; what was saved after an earlier epoch is kept"):
            terms = learner.epoch(epoch, f"epoch {epoch + 1}/{params.num_epochs}")
        trained = time.perf_counter()
        row = {"epoch": epoch + 1, **terms, **evaluate_all(network)}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            raise UserError(f"epoch {epoch + 1}: not finite: {', '.join(bad)}; what was saved after an earlier epoch "
                            "is kept")
        progress.history.append(row)
        progress.timings.append({"images_per_second": learner.images / (trained - start),
                                 "seconds": time.perf_counter() - start})
        end_of_epoch()
