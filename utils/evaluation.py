"""Frozen networks, and the metrics of any network on a part of the data."""
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

Metric = Callable[[nn.Module, Tensor], Row]  # of a network and its confusion matrix (C, C) on the test images


@dataclass(frozen=True)
class Queries:
    """What a thief sends to a frozen network.

    `once`: each training image once, not augmented, before the first epoch, instead of every augmented view in every
    epoch. `views`: the number of augmented views whose answers are averaged into one, each of them a query.
    """

    once: bool = False
    views: int = 1

    @property
    def precomputed(self) -> bool:
        """Whether the answers of all images are computed before an epoch."""
        return self.once or self.views > 1

    def count(self, part: int, per_epoch: int, epochs: int) -> int:
        """Number of queries of a run. part: training images; per_epoch: those of the steps of an epoch."""
        return self.views * (part if self.precomputed else per_epoch) * (1 if self.once else epochs)


class Frozen:
    """A network in eval mode without gradients, and what it answers to the batches of a loss."""

    def __init__(self, network: nn.Module, answers: Callable[[Tensor], Tensor] | None = None,
                 queries: Queries | None = None) -> None:
        """answers: what a client gets for logits (B, C), (B, C); None: the logits. queries: those of a thief, which are
        counted; None: the network is the run's own."""
        self.network = network.eval().requires_grad_(False)
        self.answers = answers
        self.queries = queries
        self._cache: TeacherCache | None = None  # of the logits, which serve every kind of answers
        self._table: Tensor | None = None  # answers (N, C), filled in place: a recorded step reads this tensor
        self._filled = False
        # Called with the table of answers when it is filled.
        self.on_answers_ready: Callable[[Tensor], None] = lambda _: None

    def prepare(self, weights: str, num_classes: int, batches: TrainBatches, dtype: torch.dtype,
                directory: Path | None, log: Callable[[str], None]) -> None:
        """Answer batches of these training images from a table, where it is asked for: by a directory of cached logits,
        see `TeacherCache`, or by queries that are not the views of the batches."""
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
        """Answers (B, C) to a batch, float32: log-probabilities up to a constant per row, which a loss may save for
        backward. With cached logits they are those of the images as the batch was augmented."""
        if self._table is not None:
            return batch.look_up(self._table)
        if self._cache is not None:
            logits = batch.look_up(self._cache.logits)
        else:
            with torch.inference_mode():
                logits = self.network(batch.images)
            logits = logits.clone()  # outside inference mode: a tensor that autograd may save
        return self.answers(logits) if self.answers else at_least_float32(logits)

    def start_epoch(self, epoch: int) -> None:
        """Have the cached logits, or the table of answers, of an epoch, counted from 0, ready."""
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
        """The network as a client meets it: images to answers (B, C). Behind an interface, probabilities that are
        exactly 0 count as 1e-6."""
        return _WithInterface(self.network, self.answers) if self.answers else self.network


class _WithInterface(nn.Module):
    def __init__(self, network: nn.Module, answers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.answers = network, answers

    def forward(self, images: Tensor) -> Tensor:
        return finite_log_probabilities(self.answers(self.network(images)))  # for a cross-entropy that is finite


class Evaluation:
    """The metrics of a network: accuracy and loss on the held-out and the test images, and further ones."""

    def __init__(self, parts: Mapping[str, Images], dtype: torch.dtype, metrics: Sequence[Metric] = (),
                 remedy: str = "") -> None:
        """parts: `test` and maybe `validation`. metrics: further ones, of the test images. remedy: what needs less
        memory, for the error where there is too little."""
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
    """Accuracy in percent (correct of all, exact) and mean cross-entropy in nats over a part of the data, not empty."""
    counts, loss = confusion_matrix(network, part, dtype)
    return {"accuracy": accuracy(counts), "loss": loss}


def accuracy(counts: Tensor) -> float:
    """Of a confusion matrix, in percent."""
    return 100 * counts.trace().item() / counts.sum().item()


def confusion_matrix(network: nn.Module, part: Images, dtype: torch.dtype) -> tuple[Tensor, float]:
    """How many images of each class (row) are taken for which (column), float64 (C, C) on the CPU, over a part of the
    data, not empty, and the mean cross-entropy in nats."""
    device = part.labels.device
    with eval_mode(network), torch.inference_mode(), autocast(device, dtype):
        classes = network(normalize(part.images[:1], part.mean, part.std)).shape[1]
        sums = torch.zeros(classes**2 + 1, dtype=torch.float64, device=device)  # of the pairs, and of the losses
        for images, labels in in_order(part):
            logits = network(images)
            sums.index_add_(0, labels * classes + logits.argmax(1), torch.ones_like(labels, dtype=torch.float64))
            sums[-1] += cross_entropy(logits, labels).double() * len(labels)
    *counts, loss = distributed.sum_over_ranks(sums).tolist()
    return torch.tensor(counts, dtype=torch.float64).view(classes, classes), loss / len(part)
