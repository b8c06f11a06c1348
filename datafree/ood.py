"""Distillation on patches of one picture that has nothing to do with the data: Asano, Saeed, "The Augmented
Image Prior: Distilling 1000 Classes by Extrapolating from a Single Image", ICLR 2023, arXiv:2112.00725, as configured
by ABD ("OoD").

The student learns what the teacher says of patches that are mixed in pairs (CutMix):

    loss = mean of T^2 KL(teacher || student)

With the shuffling vaccine, what the teacher says of suspicious patches is driven out of the student instead.
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from datafree.distiller import Defence, Facts
from datafree.losses import kl_per_sample
from datafree.patches import balance, cutmix, draw_cutmix, draw_picture, load_picture, patches
from datafree.vaccine import ascent_cap, student_loss, suspicious
from utils import seeds
from utils.data import Batch, Images, TrainBatches, in_order
from utils.errors import UserError
from utils.memory import Phase
from utils.params import OoDParams
from utils.step import Loss, Step, autocast
from utils.supervised import Supervised, build_adam
from utils.training import Row


class OoD(Supervised):
    """A `Learner` of the student. An epoch is a pass over the patches."""

    def __init__(self, student: nn.Module, teacher: nn.Module, facts: Facts, params: OoDParams,
                 dtype: torch.dtype) -> None:
        """teacher: frozen. dtype: of the arithmetic of the networks."""
        self.teacher, self.facts = teacher, facts
        self.defence = Defence(teacher, params, facts)
        # Never rotated: the patches were when they were cut.
        augmentation = facts.augmentation and ("crop_flip" if facts.flips else "crop")
        batches = TrainBatches(self._patches(params, dtype), params.batch_size, augmentation, params.seed)
        super().__init__(student, self.terms, batches, params, dtype)

    @Phase("making the patches", 'reduce "patches"')
    def _patches(self, params: OoDParams, dtype: torch.dtype) -> Images:
        """The data set that is made of one picture, with labels that mean nothing."""
        picture = load_picture(params.picture) if params.picture else draw_picture(params.seed)
        self.picture = hashlib.sha256(picture.numpy()).hexdigest()
        pixels = patches(picture, params.patches, self.facts.image_size, params.seed, tuple(params.patch_kinds))
        pixels = pixels.to(self.facts.mean.device)
        labels = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
        part = Images(pixels, labels, self.facts.mean, self.facts.std)
        if not params.balance:
            return part
        with torch.inference_mode(), autocast(pixels.device, dtype):
            predicted = torch.cat([self.teacher(images).argmax(1) for images, _ in in_order(part)])
        chosen = balance(predicted, params.patches, self.facts.num_classes, seed=params.seed)
        return dataclasses.replace(part, images=pixels[chosen.to(pixels.device)])

    def begin(self, say: Callable[[str], None]) -> None:
        self.defence.begin(say)
        self._build_step()

    def _build_step(self) -> None:
        # As written: the boxes of CutMix and the vaccine's switches are values of Python.
        self.step = _Step(self, self.network, self.loss, self.optimizer, self.batches, self.dtype)

    def epoch(self, epoch: int, title: str) -> Row:
        self.retrospects = self.defence.retrospects(epoch)
        if self.defence.begins_retrospection(epoch):
            self.optimizer = build_adam(self.network, self.params.sr_learning_rate)
            self._build_step()
        self.random = seeds.generator(self.params.seed, "cutmix", epoch)
        self.sr_random = self.defence.random(epoch)
        return super().epoch(epoch, title)

    def rate(self, epoch: int) -> float:
        return self.defence.rate(epoch) if self.retrospects else super().rate(epoch)

    def mixed(self, batch: Batch) -> Tensor:
        """The images of a batch as the networks see them."""
        if not self.params.cutmix:
            return batch.images
        return cutmix(batch.images, draw_cutmix(len(batch.images), self.facts.image_size, self.random))

    def terms(self, student: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """The loss of images (B, 3, H, W), and its parts as logged."""
        temperature = self.params.temperature
        with torch.no_grad():
            teacher_logits = self.teacher(images)
            self.defence.observe(teacher_logits, images)
        kd = temperature**2 * kl_per_sample(teacher_logits, student(images), temperature=temperature)
        if not self.defence.shuffled:
            return {"loss": kd.mean(), "kl": kd.mean()}
        if not self.defence.coefficient:
            return {"loss": kd.mean(), "kl": kd.mean(), "suspicious": torch.zeros_like(kd[0])}
        with torch.no_grad():
            mask = suspicious(teacher_logits, self.defence.shuffled(images))
        loss = student_loss(kd, mask, coefficient=self.defence.coefficient,
                            cap=ascent_cap(teacher_logits, temperature=temperature))
        return {"loss": loss, "kl": kd.mean(), "suspicious": 100 * mask.float().mean()}

    def pictures(self) -> dict[str, Tensor]:
        """Patches that the student learns from, (B, 3, H, W) in [0, 1], and the perturbation."""
        return {"synthetic": self.batches.part.images[:64].permute(0, 3, 1, 2) / 255, **self.defence.pictures()}

    def state_dict(self) -> dict:
        return {**super().state_dict(), "defence": self.defence.state_dict(), "picture": self.picture}

    def load_state_dict(self, state: dict) -> None:
        if state["picture"] != self.picture:
            which = self.params.picture or "the picture that is drawn here"
            raise UserError(f"{which} is not the picture that this run began with; --restart starts over")
        self.defence.load_state_dict(state["defence"])
        if self.defence.retrospects(state["epoch"] - 1):  # the optimiser that was saved is that of retrospection
            self.optimizer = build_adam(self.network, self.params.sr_learning_rate)
        super().load_state_dict(state)


class _Step(Step):
    """A step on mixed images, with the gradient of self-retrospection where it is on."""

    def __init__(self, learner: OoD, *arguments: object) -> None:
        super().__init__(*arguments)
        self.learner = learner

    def differentiate(self, loss: Loss, batch: Batch, share: float) -> dict[str, Tensor]:
        learner = self.learner
        images = learner.mixed(batch)
        terms = super().differentiate(loss, images, share)
        if learner.retrospects:
            terms |= learner.defence.retrospect(self.network, learner.teacher, images, learner.sr_random)
        return terms
