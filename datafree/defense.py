"""Backdoor defenses of a run (ABD): shuffling vaccine and self-retrospection, as set by `backdoor_defense`."""
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
    """Backdoor defense of a run, by its parameter `backdoor_defense`:

        none    no defense
        sv      the vaccine in all epochs; with `sv_batches`, only if the search finds one
        sr      self-retrospection in the last `sr_epochs`
        sv+sr   both
        auto    sv with a search for a vaccine; sr if none is found before the last `sr_epochs` (with `sv_fallback`:
                only if the search has not ended by then)

    With `sv+sr`, the vaccine stays on during self-retrospection: in the loss of the generator or, for `ood`, in the
    distillation loss, to whose gradient the hypergradient is added.
    """

    def __init__(self, teacher: nn.Module, params: DataFreeParams, *, temperature: float, image_size: int) -> None:
        """teacher: frozen network. temperature: temperature of the divergences of self-retrospection. Raises UserError
        if the teacher has fewer convolutions than `sv_layers`."""
        self.vaccine: Vaccine | None = None
        if params.backdoor_defense in ("sv", "sv+sr", "auto"):
            self.vaccine = Vaccine(teacher, params, image_size)
        self._params = params
        self._step = Retrospection(
            temperature=temperature, weight=params.sr_weight, rounds=params.sr_rounds,
            learning_rate=params.sr_perturbation_rate, start=params.sr_start, penalty=params.sr_penalty,
            radius=params.sr_radius, steps=params.sr_steps, eta=params.sr_eta, portion=params.sr_portion,
            detach_clean=params.sr_detach, batch_norm=params.sr_batch_norm)
        self._first_epoch = max(0, params.num_epochs - params.sr_epochs)  # of self-retrospection, from 0
        self._current: RetrospectionEpoch | None = None
        self._log: Callable[[str], None] = print

    def setup(self, log: Callable[[str], None]) -> None:
        """Log the settings of the defense, and use `log` for later messages."""
        self._log = log
        if self.vaccine:
            self.vaccine.setup(log)

    def start_epoch(self, epoch: int) -> RetrospectionEpoch | None:
        """Return the self-retrospection of an epoch (from 0), or None if the epoch is without it."""
        self._current = None
        if self.uses_retrospection(epoch):
            self._current = RetrospectionEpoch(self._step, self._params, epoch, self._first_epoch)
            if self._current.is_first:  # a vaccine that is found later would end it
                unfinished = self.vaccine is not None and self.vaccine.stop_search()
                self._log("self-retrospection: starts in this epoch; its steps take several times as long"
                          + "; the unfinished search for a vaccine stops" * unfinished)
        return self._current

    def uses_retrospection(self, epoch: int) -> bool:
        """True if the student is trained with self-retrospection in an epoch (from 0)."""
        needed = self._params.backdoor_defense in ("sr", "sv+sr")
        if self._params.backdoor_defense == "auto":
            needed = self.vaccine is None or not self.vaccine.found
        return needed and epoch >= self._first_epoch

    def epoch_images(self) -> dict[str, Tensor]:
        """Last perturbation of self-retrospection, (1, 3, H, W), scaled to [0, 1] with 0 at 1/2; empty without one."""
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
    """Shuffling vaccine of a run: the ensemble T~ and, with `sv_batches` or `auto`, the search for a good shuffle."""

    def __init__(self, teacher: nn.Module, params: DataFreeParams, image_size: int) -> None:
        """teacher: frozen network. Raises UserError if it has fewer convolutions than `sv_layers`."""
        self.shuffled = ShuffledTeacher(teacher, layers=params.sv_layers, members=params.sv_members, seed=params.seed,
                                        image_size=image_size)
        self._params = params
        self._selection: Selection | None = None
        if params.sv_batches or params.backdoor_defense == "auto":
            batches = params.sv_batches or 50
            self._selection = Selection(batches=batches, skip=min(11, batches // 2), min_tail=params.sv_tail,
                                        fallback=params.sv_fallback)
        self._log: Callable[[str], None] = print

    def setup(self, log: Callable[[str], None]) -> None:
        """Log the shuffled layers and the limit of the search, and use `log` for the result of the search."""
        self._log = log
        layers = ", ".join(self.shuffled.layers)
        log(f"vaccine: {self._params.sv_members} copies of the teacher with shuffled input channels of {layers}")
        if self._selection and not self._selection.finished:
            log(f"vaccine: searching for up to {self._selection.limit} batches, not used until one is found")

    @property
    def found(self) -> bool:
        """True if the current T~ is used: the search accepted it, or there is no search."""
        return self._selection is None or self._selection.found

    @property
    def coefficient(self) -> float:
        """Weight of the vaccine's term; 0 until a vaccine is found."""
        return self._params.sv_weight if self.found else 0.0

    def observe(self, teacher_logits: Tensor, images: Tensor) -> None:
        """Evaluate the current T~ on the images (B, 3, H, W) of a batch, during the search. Call once per batch.

        teacher_logits: (B, C), for these images.
        """
        if self._selection is None or self._selection.finished:
            return
        with torch.no_grad():
            k = divergence(teacher_logits.detach(), self.shuffled(images.detach()))
        if self._selection.observe(k):
            self.shuffled.shuffle(self._selection.number)
        if self._selection.finished:
            tails = ", ".join(f"{ratio:.3f}" for ratio in self._selection.ratios)
            if self._selection.accepted:
                found = "found"
            elif self._selection.found:
                found = f"none passed the test, the best one is used, number {self._selection.number + 1}"
            else:
                found = "none found, the run continues without one"
            self._log(f"vaccine: {found} (tail ratios {tails}, must exceed {self._params.sv_tail})")

    def penalty(self, teacher_logits: Tensor, images: Tensor) -> Tensor:
        """Term of a generator's loss, a scalar: `generator_penalty` of the images; 0 until a vaccine is found."""
        if not self.coefficient:
            return torch.zeros((), device=images.device)
        return generator_penalty(teacher_logits, self.shuffled(images), coefficient=self.coefficient)

    def stop_search(self) -> bool:
        """End the search. Return True if it was in progress."""
        if self._selection is None or self._selection.finished:
            return False
        self._selection.stop_search()
        return True

    def end_of_training(self) -> None:
        """End the search, and log it if it was in progress."""
        if self.stop_search():
            self._log('vaccine: not used, the run ended before the search: reduce "sv_batches" or train longer')

    def report(self) -> dict[str, Any]:
        """Entry of results.json: `used`, and `tails`, the tail ratios of the shuffles tried."""
        return {"used": bool(self.coefficient), "tails": self._selection.ratios if self._selection else None}

    def state_dict(self) -> dict[str, Any]:
        return {"vaccine": self.shuffled.state_dict(),
                "selection": self._selection.state_dict() if self._selection else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shuffled.load_state_dict(state["vaccine"])
        if self._selection:
            self._selection.load_state_dict(state["selection"])


class RetrospectionEpoch:
    """One epoch of self-retrospection. `is_first`: the first one, before which the student gets a new optimizer."""

    def __init__(self, step: Retrospection, params: DataFreeParams, epoch: int, first_epoch: int) -> None:
        self.is_first = epoch == first_epoch
        self.delta: Tensor | None = None  # the last perturbation
        self._step, self._params, self._first_epoch = step, params, first_epoch
        self._random = seeds.generator(params.seed, "retrospection", epoch)

    def learning_rate(self, done: float) -> float:
        """Learning rate of the student after `done` epochs of the run: half a cosine over the retrospection epochs."""
        epochs = self._params.num_epochs - self._first_epoch
        return cosine(self._params.sr_learning_rate, (done - self._first_epoch) / epochs)

    def accumulate(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Add the gradient of self-retrospection to the student's `.grad`, and return scalars to log."""
        source = teacher if self._params.sr_source == "teacher" else student
        self.delta, scalars = self._step.accumulate(student, source, images, self._random)
        return scalars
