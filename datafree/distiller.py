"""Base class and helpers of the data-free methods.

A method gets a `DataSpec` and networks, but no images of the data set.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from datafree.defense import BackdoorDefense
from datafree.params import DataFreeParams
from utils.errors import UserError
from utils.evaluation import Frozen
from utils.results import Row
from utils.supervised import check_finite
from utils.training import Learner


@dataclass(frozen=True)
class DataSpec:
    """Properties of the teacher's training data that a data-free method may use."""

    num_classes: int
    image_size: int  # height and width in pixels
    mean: Tensor  # float32 (3,), on the device, for pixels in [0, 1]
    std: Tensor
    augmentation: str | None  # preserves the class of an image; see `utils.data.TrainBatches`

    @property
    def flips(self) -> bool:
        """True if a mirrored image has the same class."""
        return self.augmentation is not None and "flip" in self.augmentation

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize pixels in [0, 1], (B, 3, H, W), for the networks. Differentiable."""
        return (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def sum_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum of one or more scalars."""
    first, *others = losses.values()
    return sum(others, first)


def set_gradients(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Set `.grad` of these parameters to the gradient of a loss. Other parameters keep theirs."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


class LossMeter:
    """Running means of the scalars that the steps of an epoch return, kept on the device."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._records: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, terms: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add the terms of a step. weight: the step's weight in the means, such as its batch size."""
        self._names = list(terms)
        self._records.append(torch.stack([value.detach().float() for value in terms.values()]))
        self._weights.append(weight)

    def check(self, epoch: int, first: int = 1) -> None:
        """Raise UserError if a value of step `first` (from 1) or later is not finite."""
        check_finite(self._records[first - 1:], self._names, epoch, first)

    def average(self) -> dict[str, Tensor]:
        """Weighted mean of each term, a scalar on the device."""
        records = torch.stack(self._records).double()
        weights = torch.tensor(self._weights, dtype=torch.float64, device=records.device).unsqueeze(1)
        return dict(zip(self._names, (records * weights).sum(0) / sum(self._weights), strict=True))

    def means(self) -> Row:
        return {name: value.item() for name, value in self.average().items()}


class Distiller(Learner):
    """Learner that trains a student without data. `Params` are the method's parameters."""

    Params: ClassVar[type[DataFreeParams]] = DataFreeParams
    needs_network: ClassVar[bool] = True  # gradients or activations of the teacher, not only answers
    defense: BackdoorDefense

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: Any, dtype: torch.dtype) -> None:
        """Raises UserError if the arguments do not fit together.

        Args:
            student: network to train.
            teacher: frozen network.
            spec: properties of the teacher's training data.
            params: an instance of `Params`.
            dtype: dtype of the networks' arithmetic.
        """

    def training_images(self) -> Iterator[Tensor] | None:
        """Endless batches (B, 3, H, W) of new normalized images as at the time of the first one, for the diagnosis of
        the student's batch norms; None if the method has none."""
        return None


def teacher_with_interface(teacher: Frozen, method: type[Distiller], params: DataFreeParams) -> nn.Module:
    """Teacher as a method may use it: the network itself or, behind an interface, only its answers. Raises UserError if
    the method or the backdoor defense needs more than answers."""
    if teacher.answers is None:
        return teacher.network
    needs = f'"method": {params.method}' if method.needs_network else f'"backdoor_defense": {params.backdoor_defense}'
    if method.needs_network or params.backdoor_defense != "none":
        raise UserError(f"{needs} needs the teacher's weights or gradients, but {teacher.answers} only gives "
                        "answers: use the interface logits and no answer defense")
    return teacher.with_interface
