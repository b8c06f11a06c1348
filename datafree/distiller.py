"""What the data-free methods share: what they may know of the data, the teacher they learn from, and their defences.

A method gets `Facts` and networks, and no images: there is no way from here to the data set.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datafree.retrospection import Retrospection
from datafree.vaccine import Selection, ShuffledTeacher, divergence
from utils import seeds
from utils.params import DataFreeParams
from utils.supervised import check_finite, cosine
from utils.training import Row


@dataclass(frozen=True)
class Facts:
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

    def standardise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 3, H, W), as the networks see them; gradients pass."""
        return (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def differentiate_by(parameters: list[Tensor], loss: Tensor) -> None:
    """Put the gradient of a loss in these parameters, and in no others that it went through, in their `.grad`."""
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


class Terms:
    """What the steps of an epoch yield: scalars by name, on the device until the end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.records: list[Tensor] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        self.names = list(terms)
        self.records.append(torch.stack([value.detach().float() for value in terms.values()]))

    def check(self, epoch: int, first: int = 1) -> None:
        """Raise UserError if a value of the steps from `first` on, counted from 1, is not finite."""
        check_finite(self.records[first - 1:], self.names, epoch, first)

    def average(self) -> dict[str, Tensor]:
        """The mean of each, still on the device."""
        return dict(zip(self.names, torch.stack(self.records).double().mean(0), strict=True))

    def means(self) -> Row:
        return {name: value.item() for name, value in self.average().items()}


class Defence:
    """ABD as parameters ask for it: the shuffling vaccine, self-retrospection, or what is needed of both.

        none    nothing
        sv      the vaccine throughout; with `sv_batches`, if one with a large tail is found
        sr      retrospection in the last `sr_epochs`
        sv+sr   both
        auto    sv with a search for a vaccine; sr if none is found until then
    """

    def __init__(self, teacher: nn.Module, params: DataFreeParams, facts: Facts) -> None:
        """teacher: frozen. Raises UserError if it has fewer convolutions than are to be shuffled."""
        self.params = params
        self.say: Callable[[str], None] = print
        self.delta: Tensor | None = None  # the last perturbation of self-retrospection
        self.shuffled: ShuffledTeacher | None = None
        self.selection: Selection | None = None
        if params.defense in ("sv", "sv+sr", "auto"):
            self.shuffled = ShuffledTeacher(teacher, layers=params.sv_layers, members=params.sv_members,
                                            seed=params.seed, image_size=facts.image_size)
            if params.sv_batches or params.defense == "auto":
                batches = params.sv_batches or 50
                self.selection = Selection(batches=batches, skip=min(11, batches // 2), least=params.sv_tail)
        self.retrospection = Retrospection(
            temperature=params.temperature, weight=params.sr_weight, rounds=params.sr_rounds,
            learning_rate=params.sr_perturbation_rate, start=params.sr_start, penalty=params.sr_penalty,
            radius=params.sr_radius, steps=params.sr_steps, eta=params.sr_eta, portion=params.sr_portion,
            detach_clean=params.sr_detach, batch_norm=params.sr_batch_norm)

    def begin(self, say: Callable[[str], None]) -> None:
        """Say what the defence will do, and from now on what it does."""
        self.say = say
        if self.shuffled:
            layers = ", ".join(self.shuffled.layers)
            say(f"vaccine: {self.params.sv_members} copies of the teacher, the input channels of {layers} shuffled")
        if self.selection and not self.selection.finished:
            most = self.selection.skip + self.selection.tries * (self.selection.batches - self.selection.skip)
            say(f"vaccine: not used until one is found, a search of up to {most} batches")

    def report(self) -> dict[str, Any]:
        """How the vaccine was used, for results.json."""
        return {"used": bool(self.coefficient), "tails": self.selection.ratios if self.selection else None}

    @property
    def coefficient(self) -> float:
        """Of the vaccine: 0 as long as none is found."""
        found = self.selection is None or self.selection.found
        return self.params.sv_weight if self.shuffled and found else 0.0

    def observe(self, teacher_logits: Tensor, images: Tensor) -> None:
        """Once a batch, while a vaccine is searched for: judge the present one by these images."""
        if self.selection is None or self.selection.finished:
            return
        with torch.no_grad():
            k = divergence(teacher_logits.detach(), self.shuffled(images.detach()))
        if self.selection.observe(k):
            self.shuffled.shuffle()
        if self.selection.finished:
            tails = ", ".join(f"{ratio:.3f}" for ratio in self.selection.ratios)
            found = "found" if self.selection.found else "none found, the run goes on without"
            self.say(f"vaccine: {found} (tails {tails}, more than {self.params.sv_tail} is asked for)")

    def retrospects(self, epoch: int) -> bool:
        """Whether the student's steps of an epoch, counted from 0, are those of self-retrospection."""
        wanted = self.params.defense in ("sr", "sv+sr") or (self.params.defense == "auto" and not self.selection.found)
        return wanted and epoch >= self.first_epoch

    def begins_retrospection(self, epoch: int) -> bool:
        """Whether an epoch is the first of self-retrospection, for which the student gets a new optimiser; says so."""
        if not self.retrospects(epoch) or epoch > self.first_epoch:
            return False
        unfinished = self.selection is not None and not self.selection.finished
        if unfinished:
            self.selection.given_up = True  # a vaccine found later would end what begins here
        self.say("self-retrospection: from this epoch on, in steps that take several times as long"
                 + "; the search for a vaccine was not over and is given up" * unfinished)
        return True

    @property
    def first_epoch(self) -> int:
        """Of self-retrospection, counted from 0."""
        return max(0, self.params.num_epochs - self.params.sr_epochs)

    def rate(self, done: float) -> float:
        """The student's learning rate in self-retrospection after `done` epochs: half a cosine over its own epochs."""
        epochs = self.params.num_epochs - self.first_epoch
        return cosine(self.params.sr_learning_rate, (done - self.first_epoch) / epochs)

    def retrospect(self, student: nn.Module, teacher: nn.Module, images: Tensor,
                   random: torch.Generator) -> dict[str, Tensor]:
        """Add the gradient of self-retrospection to that of distillation. Scalars to log."""
        source = teacher if self.params.sr_source == "teacher" else student
        self.delta, scalars = self.retrospection.accumulate(student, source, images, random)
        return scalars

    def pictures(self) -> dict[str, Tensor]:
        """The last perturbation, (1, 3, H, W), its values stretched to [0, 1]."""
        if self.delta is None:
            return {}
        return {"perturbation": (1 + self.delta / self.delta.abs().max()) / 2}

    def random(self, epoch: int) -> torch.Generator:
        return seeds.generator(self.params.seed, "retrospection", epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"vaccine": self.shuffled.state_dict() if self.shuffled else {},
                "selection": self.selection.state_dict() if self.selection else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.shuffled:
            self.shuffled.load_state_dict(state["vaccine"])
        if self.selection:
            self.selection.load_state_dict(state["selection"])
