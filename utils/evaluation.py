"""Frozen networks, and evaluation of networks on a part of the data."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import distributed
from utils.augment import normalize
from utils.data import Batch, Images, TrainBatches, in_order
from utils.losses import at_least_float32, cross_entropy, finite_log_probabilities
from utils.memory import Phase
from utils.results import Row
from utils.step import autocast, eval_mode
from utils.teacher_cache import TeacherCache

Metric = Callable[[nn.Module, Tensor], Row]  # (network, confusion matrix (C, C) on the test images) -> metrics


@dataclass(frozen=True)
class Queries:
    """Queries of a thief to a frozen network.

    `once`: each training image once, not augmented, before the first epoch, instead of every augmented view in every
    epoch. `views`: number of augmented views per image whose answers are averaged; each view is a query.
    """

    once: bool = False
    views: int = 1

    @property
    def precomputed(self) -> bool:
        """Whether the answers to all images are computed before an epoch."""
        return self.once or self.views > 1

    def count(self, part: int, per_epoch: int, epochs: int) -> int:
        """Number of queries of a run. part: training images; per_epoch: images in the steps of an epoch."""
        return self.views * (part if self.precomputed else per_epoch) * (1 if self.once else epochs)


class Frozen:
    """Network in eval mode without gradients, and its answers to training batches."""

    def __init__(self, network: nn.Module, answers: Callable[[Tensor], Tensor] | None = None,
                 queries: Queries | None = None) -> None:
        """answers: maps logits (B, C) to the answers (B, C) of the interface; None: the logits. queries: those of a
        thief, which are counted; None: the network is the run's own."""
        self.network = network.eval().requires_grad_(False)
        self.answers = answers
        self.queries = queries
        self._cache: TeacherCache | None = None  # of logits, from which answers are computed
        self._table: Tensor | None = None  # answers (N, C), filled in place: a recorded step reads this tensor
        self._filled = False
        # Called with the table of answers (N, C) once it is filled.
        self.on_answers_ready: Callable[[Tensor], None] = lambda _: None

    def prepare(self, weights: str, num_classes: int, batches: TrainBatches, dtype: torch.dtype,
                directory: Path | None, log: Callable[[str], None]) -> None:
        """Set up tables of answers to these training images if needed: for cached logits (`directory`, see
        `TeacherCache`) or for queries other than the augmented views of the batches."""
        queries = self.queries or Queries()
        if not (directory or queries.precomputed):
            return
        if queries.once and queries.views == 1:
            batches = TrainBatches(batches.part, batches.batch_size, None, batches.seed)
        if directory and batches.views is None:
            log(f"teacher_cache: not used, {batches.augmentation} makes an unlimited number of views")
            directory = None
        if directory or queries.precomputed:
            self._cache = TeacherCache(self.network, weights, num_classes, batches, dtype, directory, log)
        if queries.precomputed:
            self._table = torch.zeros(len(batches.part), num_classes, device=batches.part.labels.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Answers (B, C) to a batch, float32: log-probabilities up to a constant per row. They are ordinary tensors,
        which autograd may save, and belong to the augmented images even if they come from a table."""
        if self._table is not None:
            return batch.look_up(self._table)
        if self._cache is not None:
            logits = batch.look_up(self._cache.logits)
        else:
            with torch.inference_mode():
                logits = self.network(batch.images)
            logits = logits.clone()  # outside inference mode, so that autograd may save it
        return self.answers(logits) if self.answers else at_least_float32(logits)

    def start_epoch(self, epoch: int) -> None:
        """Fill the cached logits or the table of answers for an epoch, counted from 0."""
        if self._table is not None and self.queries:
            if not (self.queries.once and self._filled):
                self._filled = True
                self._precompute_answers(0 if self.queries.once else epoch, self.queries.views)
                self.on_answers_ready(self._table)
        elif self._cache is not None:
            self._cache.start_epoch(epoch)

    def _precompute_answers(self, epoch: int, views: int) -> None:
        assert self._table is not None and self._cache is not None
        answers = self.answers or at_least_float32
        if views == 1:
            self._table.copy_(answers(self._cache.fill(epoch)))
            return
        total = torch.zeros_like(self._table)
        for view in range(views):
            total += answers(self._cache.fill(epoch * views + view)).softmax(1)
        self._table.copy_((total / views).log())

    @cached_property
    def with_interface(self) -> nn.Module:
        """Network including its interface: maps images to answers (B, C). Behind an interface, probabilities of exactly
        0 count as 1e-6."""
        return _WithInterface(self.network, self.answers) if self.answers else self.network


class _WithInterface(nn.Module):
    def __init__(self, network: nn.Module, answers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.answers = network, answers

    def forward(self, images: Tensor) -> Tensor:
        return finite_log_probabilities(self.answers(self.network(images)))  # for a finite cross-entropy


class Evaluation:
    """Metrics of a network: accuracy and loss on the held-out and the test images, and optional further ones."""

    def __init__(self, parts: Mapping[str, Images], dtype: torch.dtype, metrics: Sequence[Metric] = (),
                 remedy: str = "") -> None:
        """parts: `test` and optionally `validation`. metrics: further metrics on the test images. remedy: advice for an
        out-of-memory error."""
        self.parts, self.dtype, self.metrics = parts, dtype, metrics
        self.phase = Phase("evaluating the network", remedy)

    def __call__(self, network: nn.Module) -> Row:
        row = {}
        with self.phase:
            if "validation" in self.parts:
                row = {f"validation_{key}": value
                       for key, value in evaluate(network, self.parts["validation"], self.dtype).items()}
            counts, loss = confusion_matrix(network, self.parts["test"], self.dtype)
            row |= {"test_accuracy": accuracy(counts), "test_loss": loss}
            for metric in self.metrics:
                row |= metric(network, counts)
        return row


def evaluate(network: nn.Module, part: Images, dtype: torch.dtype) -> Row:
    """Accuracy in percent (exact) and mean cross-entropy in nats over a nonempty part of the data."""
    counts, loss = confusion_matrix(network, part, dtype)
    return {"accuracy": accuracy(counts), "loss": loss}


def accuracy(counts: Tensor) -> float:
    """Accuracy in percent from a confusion matrix (C, C)."""
    return 100 * counts.trace().item() / counts.sum().item()


def confusion_matrix(network: nn.Module, part: Images, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Confusion matrix (rows: labels, columns: predictions), float64 (C, C) on the CPU, and mean cross-entropy in nats,
    over a nonempty part of the data."""
    device = part.labels.device
    with eval_mode(network), torch.inference_mode(), autocast(device, dtype):
        classes = network(normalize(part.images[:1], part.mean, part.std)).shape[1]
        sums = torch.zeros(classes**2 + 1, dtype=torch.float64, device=device)  # (label, prediction) pairs, and losses
        for images, labels in in_order(part):
            logits = network(images)
            sums.index_add_(0, labels * classes + logits.argmax(1), torch.ones_like(labels, dtype=torch.float64))
            sums[-1] += cross_entropy(logits, labels).double() * len(labels)
    *counts, loss = distributed.sum_over_ranks(sums).tolist()
    return torch.tensor(counts, dtype=torch.float64).view(classes, classes), loss / len(part)
