"""ABD in a run: the shuffling vaccine, self-retrospection, or what is needed of both, as the parameters ask."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datafree.params import DataFreeParams
from datafree.retrospection import Retrospection
from datafree.vaccine import Selection, ShuffledTeacher, divergence, generator_penalty
from utils import seeds
from utils.supervised import cosine


class BackdoorDefense:
    """The backdoor defense of a run, by its parameter `backdoor_defense`:

        none    nothing
        sv      the vaccine throughout; with `sv_batches`, if one with a large tail is found
        sr      retrospection in the last `sr_epochs`
        sv+sr   both
        auto    sv with a search for a vaccine; sr if none is found until then
    """

    def __init__(self, teacher: nn.Module, params: DataFreeParams, *, temperature: float, image_size: int) -> None:
        """teacher: frozen. temperature: of the divergences of self-retrospection. Raises UserError if the teacher has
        fewer convolutions than are to be shuffled."""
        self.vaccine: Vaccine | None = None
        if params.backdoor_defense in ("sv", "sv+sr", "auto"):
            self.vaccine = Vaccine(teacher, params, image_size)
        self._params = params
        self._step = Retrospection(
            temperature=temperature, weight=params.sr_weight, rounds=params.sr_rounds,
            learning_rate=params.sr_perturbation_rate, start=params.sr_start, penalty=params.sr_penalty,
            radius=params.sr_radius, steps=params.sr_steps, eta=params.sr_eta, portion=params.sr_portion,
            detach_clean=params.sr_detach, batch_norm=params.sr_batch_norm)
        self._first_epoch = max(0, params.num_epochs - params.sr_epochs)  # of self-retrospection, counted from 0
        self._current: RetrospectionEpoch | None = None
        self._log: Callable[[str], None] = print

    def setup(self, log: Callable[[str], None]) -> None:
        """Say what the defense will do, and from now on what it does."""
        self._log = log
        if self.vaccine:
            self.vaccine.setup(log)

    def start_epoch(self, epoch: int) -> RetrospectionEpoch | None:
        """Self-retrospection in an epoch, counted from 0; None where the student's steps are without it."""
        self._current = None
        if self.uses_retrospection(epoch):
            self._current = RetrospectionEpoch(self._step, self._params, epoch, self._first_epoch)
            if self._current.is_first:  # a vaccine found later would end what begins here
                unfinished = self.vaccine is not None and self.vaccine.stop_search()
                self._log("self-retrospection: from this epoch on, in steps that take several times as long"
                          + "; the search for a vaccine was not over and is given up" * unfinished)
        return self._current

    def uses_retrospection(self, epoch: int) -> bool:
        """Whether the student's steps of an epoch, counted from 0, are those of self-retrospection."""
        needed = self._params.backdoor_defense in ("sr", "sv+sr")
        if self._params.backdoor_defense == "auto":
            needed = self.vaccine is None or not self.vaccine.found
        return needed and epoch >= self._first_epoch

    def epoch_images(self) -> dict[str, Tensor]:
        """The last perturbation of self-retrospection, (1, 3, H, W), its values stretched to [0, 1]."""
        if self._current is None or self._current.delta is None:
            return {}
        delta = self._current.delta
        return {"perturbation": (1 + delta / delta.abs().max()) / 2}

    def state_dict(self) -> dict[str, Any]:
        return self.vaccine.state_dict() if self.vaccine else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.vaccine:
            self.vaccine.load_state_dict(state)


class Vaccine:
    """The shuffling vaccine of a run: T~ and, where the parameters ask for it, the search for a good one."""

    def __init__(self, teacher: nn.Module, params: DataFreeParams, image_size: int) -> None:
        """teacher: frozen. Raises UserError if it has fewer convolutions than are to be shuffled."""
        self.shuffled = ShuffledTeacher(teacher, layers=params.sv_layers, members=params.sv_members, seed=params.seed,
                                        image_size=image_size)
        self._params = params
        self._selection: Selection | None = None
        if params.sv_batches or params.backdoor_defense == "auto":
            batches = params.sv_batches or 50
            self._selection = Selection(batches=batches, skip=min(11, batches // 2), min_tail=params.sv_tail)
        self._log: Callable[[str], None] = print

    def setup(self, log: Callable[[str], None]) -> None:
        """Say which layers are shuffled and how long the search may take, and from now on what it finds."""
        self._log = log
        layers = ", ".join(self.shuffled.layers)
        log(f"vaccine: {self._params.sv_members} copies of the teacher, the input channels of {layers} shuffled")
        if self._selection and not self._selection.finished:
            log(f"vaccine: not used until one is found, a search of up to {self._selection.limit} batches")

    @property
    def found(self) -> bool:
        """Whether the present T~ is used: it was accepted, or there is no search."""
        return self._selection is None or self._selection.found

    @property
    def coefficient(self) -> float:
        """Weight of the vaccine's term: 0 as long as none is found."""
        return self._params.sv_weight if self.found else 0.0

    def observe(self, teacher_logits: Tensor, images: Tensor) -> None:
        """Call once a batch: while the search is on, judge the present T~ by these images."""
        if self._selection is None or self._selection.finished:
            return
        with torch.no_grad():
            k = divergence(teacher_logits.detach(), self.shuffled(images.detach()))
        if self._selection.observe(k):
            self.shuffled.shuffle()
        if self._selection.finished:
            tails = ", ".join(f"{ratio:.3f}" for ratio in self._selection.ratios)
            found = "found" if self._selection.found else "none found, the run goes on without"
            self._log(f"vaccine: {found} (tails {tails}, more than {self._params.sv_tail} is asked for)")

    def penalty(self, teacher_logits: Tensor, images: Tensor) -> Tensor:
        """Term of a generator's loss, a scalar: `generator_penalty` of the images, 0 as long as no vaccine is found."""
        if not self.coefficient:
            return torch.zeros((), device=images.device)
        return generator_penalty(teacher_logits, self.shuffled(images), coefficient=self.coefficient)

    def stop_search(self) -> bool:
        """End the search. Whether it was on."""
        if self._selection is None or self._selection.finished:
            return False
        self._selection.stop_search()
        return True

    def report(self) -> dict[str, Any]:
        """How the vaccine was used, for results.json."""
        return {"used": bool(self.coefficient), "tails": self._selection.ratios if self._selection else None}

    def state_dict(self) -> dict[str, Any]:
        return {"vaccine": self.shuffled.state_dict(),
                "selection": self._selection.state_dict() if self._selection else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shuffled.load_state_dict(state["vaccine"])
        if self._selection:
            self._selection.load_state_dict(state["selection"])


class RetrospectionEpoch:
    """An epoch of self-retrospection. `is_first`: it is the first one, for which the student gets a new optimizer."""

    def __init__(self, step: Retrospection, params: DataFreeParams, epoch: int, first_epoch: int) -> None:
        self.is_first = epoch == first_epoch
        self.delta: Tensor | None = None  # the last perturbation
        self._step, self._params, self._first_epoch = step, params, first_epoch
        self._random = seeds.generator(params.seed, "retrospection", epoch)

    def learning_rate(self, done: float) -> float:
        """The student's learning rate after `done` epochs of the run: half a cosine over those of retrospection."""
        epochs = self._params.num_epochs - self._first_epoch
        return cosine(self._params.sr_learning_rate, (done - self._first_epoch) / epochs)

    def accumulate(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Add the gradient of self-retrospection to that of distillation. Scalars to log."""
        source = teacher if self._params.sr_source == "teacher" else student
        self.delta, scalars = self._step.accumulate(student, source, images, self._random)
        return scalars
