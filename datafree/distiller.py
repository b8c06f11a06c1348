"""What the data-free methods share: what they may know of the data, and the teacher they learn from.

A method gets `DataSpec` and networks, and no images: there is no way from here to the data set.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """What a distiller knows of the data that its teacher learned from."""

    num_classes: int
    image_size: int  # height and width in pixels
    mean: Tensor  # float32 (3,), of pixels in [0, 1], on the device
    std: Tensor
    augmentation: str | None  # what leaves the class of an image as it is, see `utils.data.TrainBatches`

    @property
    def flips(self) -> bool:
        """Whether mirrored images are of the same class."""
        return self.augmentation is not None and "flip" in self.augmentation

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 3, H, W), as the networks see them; gradients pass."""
        return (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def sum_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of scalars, of at least one."""
    first, *others = losses.values()
    return sum(others, first)


def set_gradients(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Put the gradient of a loss in these parameters, and in no others that it went through, in their `.grad`."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


class LossMeter:
    """What the steps of an epoch yield: scalars by name, on the device until the end."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._records: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, terms: Mapping[str, Tensor], weight: int = 1) -> None:
        """The terms of a step. weight: of the step in the means, such as the size of its batch."""
        self._names = list(terms)
        self._records.append(torch.stack([value.detach().float() for value in terms.values()]))
        self._weights.append(weight)

    def check(self, epoch: int, first: int = 1) -> None:
        """Raise UserError if a value of the steps from `first` on, counted from 1, is not finite."""
        check_finite(self._records[first - 1:], self._names, epoch, first)

    def average(self) -> dict[str, Tensor]:
        """The mean of each, still on the device."""
        records = torch.stack(self._records).double()
        weights = torch.tensor(self._weights, dtype=torch.float64, device=records.device).unsqueeze(1)
        return dict(zip(self._names, (records * weights).sum(0) / sum(self._weights), strict=True))

    def means(self) -> Row:
        return {name: value.item() for name, value in self.average().items()}


class Distiller(Learner):
    """A learner of a student without data.

    `Params` are its parameters; the constructor takes the student, the teacher (frozen), the data spec, the parameters
    and the dtype of the networks' arithmetic, and raises UserError for what does not go together.
    """

    Params: ClassVar[type[DataFreeParams]] = DataFreeParams
    needs_network: ClassVar[bool] = True  # gradients through the teacher, or its activations; else its answers will do
    defense: BackdoorDefense

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: Any, dtype: torch.dtype) -> None:
        """See above."""


def teacher_with_interface(teacher: Frozen, method: type[Distiller], params: DataFreeParams) -> nn.Module:
    """What a method learns from: the network, or, behind an interface, only its answers. Raises UserError where the
    method needs more than those."""
    if teacher.answers is None:
        return teacher.network
    needs = f'"method": {params.method}' if method.needs_network else f'"backdoor_defense": {params.backdoor_defense}'
    if method.needs_network or params.backdoor_defense != "none":
        raise UserError(f"{needs} needs the teacher's weights or gradients, which an interface of {teacher.answers} "
                        "does not give away")
    return teacher.with_interface
