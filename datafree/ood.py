"""Distillation on patches of one picture, unrelated to the data, as configured by ABD ("OoD"): Asano, Saeed, "The
Augmented Image Prior: Distilling 1000 Classes by Extrapolating from a Single Image", ICLR 2023, arXiv:2112.00725.

The student learns the teacher's outputs for patches mixed by CutMix:

    loss = mean of T^2 KL(teacher || student)

With the shuffling vaccine, gradient ascent unlearns suspicious patches (`datafree.vaccine.student_loss`).
"""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from datafree import REGISTRY
from datafree.defense import BackdoorDefense, RetrospectionEpoch
from datafree.distiller import DataSpec, Distiller, LossMeter
from datafree.params import DataFreeParams
from datafree.patches import balance, cutmix, draw_cutmix, draw_picture, load_picture, patches
from datafree.vaccine import ascent_cap, student_loss, suspicious
from utils import seeds
from utils.console import progress_bar
from utils.convolution import fast_convolutions
from utils.data import Images, TrainBatches, in_order
from utils.errors import UserError
from utils.losses import kl_per_sample
from utils.memory import Phase
from utils.params import Params as RunParams
from utils.params import RecipeParams, Switch
from utils.results import Row
from utils.step import autocast
from utils.supervised import build_adam, build_optimizer, learning_rate, load_optimizer


@REGISTRY.register("ood", display_name="OoD", source="Asano & Saeed, ICLR 2023, arXiv:2112.00725")
class OoD(Distiller):
    """Distillation on patches of one picture. An epoch is one pass over the patches. Defaults: ABD's for CIFAR-10."""

    needs_network = False

    class Params(DataFreeParams, RecipeParams):
        optimizer: Literal["auto", "sgd", "adam"] = Field(
            "adam", description=RecipeParams.model_fields["optimizer"].description)
        learning_rate: float = Field(1e-3, gt=0, description=RunParams.model_fields["learning_rate"].description)
        schedule: list[Annotated[int, Field(ge=0)]] = Field(
            [150, 300, 600], description=RecipeParams.model_fields["schedule"].description)
        gamma: float = Field(0.5, gt=0, description=RecipeParams.model_fields["gamma"].description)
        num_epochs: int = Field(300, ge=1, description="number of passes over the patches")
        batch_size: int = Field(512, ge=2, description=RunParams.model_fields["batch_size"].description)
        temperature: float = Field(8.0, gt=0, description="temperature T of the softened outputs in the KL term")
        picture: str | None = Field(
            None, description="image file that the patches are cut from; null: a picture drawn from `seed`")
        patches: int = Field(50_000, ge=2, description="number of patches, the training images of the student")
        patch_kinds: list[Literal["colour", "grey", "blob"]] = Field(
            ["colour"], min_length=1,
            description="kinds of patches, used in turn. `colour`: unchanged; `grey`: luminance minus its mean; "
                        "`blob`: luminance inside a random shape on black")
        balance: Switch = Field(False, description="select patches that balance the teacher's predicted classes")
        cutmix: Switch = Field(True, description="apply CutMix within each batch")

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: Params,
                 dtype: torch.dtype) -> None:
        """Arguments: see `Distiller`. Raises UserError if the picture cannot be read or is too small."""
        self._student, self._teacher, self._spec, self._params, self._dtype = student, teacher, spec, params, dtype
        self._device = spec.mean.device
        self.defense = BackdoorDefense(teacher, params, temperature=params.temperature, image_size=spec.image_size)
        with Phase("making the patches", 'reduce "patches"'):
            picture = load_picture(params.picture) if params.picture else draw_picture(params.seed)
            part = self._patches(picture)
        self._picture_sha256 = hashlib.sha256(picture.numpy().tobytes()).hexdigest()
        # No rotation: patches are rotated when they are cut.
        augmentation = spec.augmentation and ("crop_flip" if spec.flips else "crop")
        self.batches = TrainBatches(part, params.batch_size, augmentation, params.seed)
        self.num_images = self.batches.usable
        self._optimizer = build_optimizer(params, student)

    def _patches(self, picture: Tensor) -> Images:
        """Data set of patches of a picture, uint8 (H, W, 3). All labels are 0."""
        params, spec = self._params, self._spec
        pixels = patches(picture, params.patches, spec.image_size, params.seed, tuple(params.patch_kinds))
        pixels = pixels.to(self._device)
        labels = torch.zeros(len(pixels), dtype=torch.int64, device=self._device)
        part = Images(pixels, labels, spec.mean, spec.std)
        if not params.balance:
            return part
        with torch.inference_mode(), autocast(self._device, self._dtype):
            predicted = torch.cat([self._teacher(images).argmax(1) for images, _ in in_order(part)])
        chosen = balance(predicted, params.patches, spec.num_classes, seed=params.seed)
        return dataclasses.replace(part, images=pixels[chosen.to(self._device)])

    def setup(self, log: Callable[[str], None]) -> None:
        self.defense.setup(log)

    def epoch(self, epoch: int, title: str) -> Row:
        params = self._params
        retrospection = self.defense.start_epoch(epoch)
        rate = learning_rate(params, epoch)
        if retrospection:
            rate = retrospection.learning_rate(epoch)
            if retrospection.is_first:
                self._optimizer = build_adam(self._student, params.sr_learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        meter = LossMeter()
        self._student.train()
        with progress_bar(self.num_images, title) as bar:
            for number, images in enumerate(self._mixed(epoch), start=1):
                meter.add(self._step(images, retrospection), weight=len(images))
                bar.update(len(images))
                if self._device.type == "cpu":  # elsewhere, a check would synchronize the device
                    meter.check(epoch, number)
        meter.check(epoch)
        return {"learning_rate": rate, **meter.means()}

    def _mixed(self, epoch: int) -> Iterator[Tensor]:
        """Iterate over the batches (B, 3, H, W) of an epoch: normalized, augmented and mixed patches."""
        random = seeds.generator(self._params.seed, "cutmix", epoch)
        for images, *_ in self.batches.epoch(epoch):
            if self._params.cutmix:
                images = cutmix(images, draw_cutmix(len(images), self._spec.image_size, random))
            yield images

    def training_images(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(map(self._mixed, itertools.count(self._params.num_epochs)))

    def _step(self, images: Tensor, retrospection: RetrospectionEpoch | None) -> dict[str, Tensor]:
        """Train the student for one step, with self-retrospection if it is given. Return scalars to log."""
        with autocast(self._device, self._dtype), fast_convolutions(self._device, self._dtype):
            terms = self._losses(images)
        self._optimizer.zero_grad()
        terms["loss"].backward()
        if retrospection:
            terms |= retrospection.accumulate(self._student, self._teacher, images)
        norm = nn.utils.clip_grad_norm_(self._student.parameters(), torch.inf)
        self._optimizer.step()
        return {**terms, "gradient_norm": norm}

    def _losses(self, images: Tensor) -> dict[str, Tensor]:
        """Loss of normalized images (B, 3, H, W), and its terms to log."""
        temperature, vaccine = self._params.temperature, self.defense.vaccine
        with torch.no_grad():
            teacher_logits = self._teacher(images)
        kd = temperature**2 * kl_per_sample(teacher_logits, self._student(images), temperature=temperature)
        if vaccine is None:
            return {"loss": kd.mean(), "kl": kd.mean()}
        vaccine.observe(teacher_logits, images)
        if not vaccine.coefficient:
            return {"loss": kd.mean(), "kl": kd.mean(), "suspicious": torch.zeros_like(kd[0])}
        with torch.no_grad():
            mask = suspicious(teacher_logits, vaccine.shuffled(images))
        loss = student_loss(kd, mask, coefficient=vaccine.coefficient,
                            cap=ascent_cap(teacher_logits, temperature=temperature))
        return {"loss": loss, "kl": kd.mean(), "suspicious": 100 * mask.float().mean()}

    def epoch_images(self) -> dict[str, Tensor]:
        """Patches, (B, 3, H, W) in [0, 1], and the last perturbation of self-retrospection."""
        return {"synthetic": self.batches.part.images[:64].permute(0, 3, 1, 2) / 255, **self.defense.epoch_images()}

    def state_dict(self) -> dict[str, Any]:
        return {"optim_dict": self._optimizer.state_dict(), "defence": self.defense.state_dict(),
                "picture": self._picture_sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["picture"] != self._picture_sha256:
            which = self._params.picture or "the drawn picture"
            raise UserError(f"{which} differs from the picture that this run started with: use --restart to start over")
        self.defense.load_state_dict(state["defence"])
        if self.defense.uses_retrospection(state["epoch"] - 1):  # the saved optimizer is that of retrospection
            self._optimizer = build_adam(self._student, self._params.sr_learning_rate)
        load_optimizer(self._optimizer, state["optim_dict"])
