"""Zero-shot knowledge transfer: Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching",
NeurIPS 2019, arXiv:1905.09768, as configured by ABD.

A generator makes images on which student and teacher disagree, and the student learns from the teacher on them:

    generator   minimizes -KL(teacher || student)
    student     minimizes  KL(teacher || student) + attention_weight * sum of attention losses

KL is the mean over batch and classes. A pseudo-batch is one draw of latent vectors z: one step of the generator, then
several steps of the student on the images of the updated generator. All these steps use the same images, so images and
teacher outputs are computed once.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from datafree import REGISTRY
from datafree.defense import BackdoorDefense, RetrospectionEpoch
from datafree.distiller import DataSpec, Distiller, LossMeter, set_gradients, sum_losses
from datafree.generator import build_generator
from datafree.losses import attention_loss, kl_element_mean
from datafree.params import DataFreeParams, LatentSize, SREpochs, SRWeight
from model.features import capture_outputs, paired_stages
from utils import seeds
from utils.augment import denormalize
from utils.console import progress_bar
from utils.convolution import fast_convolutions
from utils.errors import UserError
from utils.results import Row
from utils.step import autocast
from utils.supervised import build_adam, cosine, load_optimizer


@REGISTRY.register("zskt", display_name="ZSKT", source="Micaelli & Storkey, NeurIPS 2019, arXiv:1905.09768")
class ZSKT(Distiller):
    """Zero-shot knowledge transfer. An epoch is `pseudo_batches` pseudo-batches. Defaults: ABD's for CIFAR-10."""

    class Params(DataFreeParams):
        learning_rate: float = Field(2e-3, gt=0, description="initial learning rate of the student; cosine to 0")
        num_epochs: int = Field(400, ge=1, description="number of epochs, each of `pseudo_batches` batches")
        temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs in the KL term")
        pseudo_batches: int = Field(200, ge=1, description="generated batches per epoch")
        student_steps: int = Field(10, ge=1, description="student steps per generated batch")
        latent_size: LatentSize = 100
        generator_learning_rate: float = Field(
            1e-3, gt=0, description="initial learning rate of the generator; cosine to 0")
        attention_weight: float = Field(
            250.0, ge=0,
            description="weight of the attention loss; must be 0 for networks without stages, such as `mlp`")
        clip_norm: float = Field(5.0, gt=0, description="maximum gradient norm of student and generator")
        sr_weight: SRWeight = 0.1
        sr_epochs: SREpochs = 3

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: Params,
                 dtype: torch.dtype) -> None:
        """Arguments: see `Distiller`. Raises UserError if student and teacher have no stages to compare."""
        self._student, self._teacher, self._spec, self._params, self._dtype = student, teacher, spec, params, dtype
        self._device = spec.mean.device
        self._student_stages: tuple[str, ...] = ()  # paired with the teacher's for the attention losses
        self._teacher_stages: tuple[str, ...] = ()
        if params.attention_weight:
            pairs = paired_stages(student, teacher, spec.image_size)
            if not pairs:
                raise UserError(f'"attention_weight": {params.model_name} and {params.teacher_model} have no stages of '
                                "similar height and width to compare: set it to 0")
            self._student_stages, self._teacher_stages = zip(*pairs, strict=True)
        self._generator = build_generator(params.latent_size, spec, params.seed)
        self._generator_optimizer = build_adam(self._generator, params.generator_learning_rate)
        self._optimizer = build_adam(student, params.learning_rate)
        self.defense = BackdoorDefense(teacher, params, temperature=params.temperature, image_size=spec.image_size)
        self.num_images = params.pseudo_batches * params.student_steps * params.batch_size
        self._latest: Tensor | None = None  # normalized images of the last pseudo-batch

    def setup(self, log: Callable[[str], None]) -> None:
        self.defense.setup(log)

    def epoch(self, epoch: int, title: str) -> Row:
        params, count = self._params, self._params.pseudo_batches
        retrospection = self.defense.start_epoch(epoch)
        if retrospection and retrospection.is_first:
            self._optimizer = build_adam(self._student, params.sr_learning_rate)
        random = seeds.generator(params.seed, "latent", epoch)
        latent = torch.randn(count, params.batch_size, params.latent_size, generator=random).to(self._device)
        self._student.train()
        generator_meter, student_meter = LossMeter(), LossMeter()
        rate = self._set_learning_rates(epoch, 0.0, retrospection)
        with progress_bar(self.num_images, title) as bar:
            for number in range(count):
                self._set_learning_rates(epoch, number / count, retrospection)
                generator_meter.add(self.generator_step(latent[number]))
                images, logits, stages = self.query_teacher(latent[number])
                for _ in range(params.student_steps):
                    student_meter.add(self.student_step(images, logits, stages, retrospection))
                    bar.update(params.batch_size)
                if self._device.type == "cpu":  # elsewhere, a check would synchronize the device
                    generator_meter.check(epoch, number + 1)
                    student_meter.check(epoch, number * params.student_steps + 1)
            self._latest = images
        generator_meter.check(epoch)
        student_meter.check(epoch)
        return {"learning_rate": rate, **generator_meter.means(), **student_meter.means()}

    def generator_step(self, latent: Tensor) -> dict[str, Tensor]:
        """Train the generator for one step on z (B, latent_size). Return its loss and the vaccine's term, if any."""
        with autocast(self._device, self._dtype):
            images = self._generator(latent)
            teacher_logits, student_logits = self._teacher(images), self._student(images)
            terms = {"generator_loss": -kl_element_mean(teacher_logits, student_logits,
                                                        temperature=self._params.temperature)}
            if vaccine := self.defense.vaccine:
                vaccine.observe(teacher_logits, images)
                terms["vaccine"] = vaccine.penalty(teacher_logits, images)
        parameters = list(self._generator.parameters())
        set_gradients(parameters, sum_losses(terms))
        nn.utils.clip_grad_norm_(parameters, self._params.clip_norm)
        self._generator_optimizer.step()
        return terms

    def query_teacher(self, latent: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Images (B, 3, H, W) of z (B, latent_size), and the teacher's logits (B, C) and stage outputs for them."""
        images = self._generate(latent)
        with torch.no_grad(), autocast(self._device, self._dtype):
            logits, stages = with_outputs(self._teacher, self._teacher_stages, images)
        return images, logits, stages

    def _generate(self, latent: Tensor) -> Tensor:
        """Normalized images, float32 (B, 3, H, W), of z (B, latent_size), without gradient."""
        with torch.no_grad(), autocast(self._device, self._dtype):
            return self._generator(latent).float()

    def student_step(self, images: Tensor, teacher_logits: Tensor, teacher_stages: tuple[Tensor, ...],
                     retrospection: RetrospectionEpoch | None) -> dict[str, Tensor]:
        """Train the student for one step, with self-retrospection if it is given. Return scalars to log."""
        with autocast(self._device, self._dtype), fast_convolutions(self._device, self._dtype):
            logits, stages = with_outputs(self._student, self._student_stages, images)
            terms = {"kl": kl_element_mean(teacher_logits, logits, temperature=self._params.temperature)}
            loss = terms["kl"]
            if stages:
                terms["attention"] = attention_loss(stages, teacher_stages)
                loss = loss + self._params.attention_weight * terms["attention"]
        self._optimizer.zero_grad()
        loss.backward()
        if retrospection is None:
            norm = nn.utils.clip_grad_norm_(self._student.parameters(), self._params.clip_norm)
        else:
            terms |= retrospection.accumulate(self._student, self._teacher, images)
            norm = nn.utils.clip_grad_norm_(self._student.parameters(), torch.inf)
        self._optimizer.step()
        return {"loss": loss, **terms, "gradient_norm": norm}

    def training_images(self) -> Iterator[Tensor]:
        params = self._params
        random = seeds.generator(params.seed, "latent", params.num_epochs)
        while True:
            latent = torch.randn(params.batch_size, params.latent_size, generator=random)
            yield self._generate(latent.to(self._device))

    def epoch_images(self) -> dict[str, Tensor]:
        """Images of the last pseudo-batch, (B, 3, H, W) in [0, 1], and the last perturbation of self-retrospection."""
        if self._latest is None:
            return self.defense.epoch_images()
        latest = denormalize(self._latest[:64], self._spec.mean, self._spec.std)
        return {"synthetic": latest, **self.defense.epoch_images()}

    def state_dict(self) -> dict[str, Any]:
        return {"optim_dict": self._optimizer.state_dict(), "generator": self._generator.state_dict(),
                "generator_optim_dict": self._generator_optimizer.state_dict(), "defence": self.defense.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self._optimizer, state["optim_dict"])
        self._generator.load_state_dict(state["generator"])
        load_optimizer(self._generator_optimizer, state["generator_optim_dict"])
        self.defense.load_state_dict(state["defence"])

    def _set_learning_rates(self, epoch: int, part: float, retrospection: RetrospectionEpoch | None) -> float:
        """Set the learning rates: half a cosine over the run, or for the student over the epochs of self-retrospection.

        part: finished fraction of the epoch. Returns the student's rate.
        """
        params = self._params
        done = (epoch + part) / params.num_epochs
        rate = cosine(params.learning_rate, done)
        if retrospection:
            rate = retrospection.learning_rate(epoch + part)
        for optimizer, value in ((self._optimizer, rate),
                                 (self._generator_optimizer, cosine(params.generator_learning_rate, done))):
            for group in optimizer.param_groups:
                group["lr"] = value
        return rate


def with_outputs(network: nn.Module, names: Sequence[str], images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (B, C) for images (B, 3, H, W), and the outputs of the named modules."""
    with capture_outputs(network, *names) as captured:
        logits = network(images)
    return logits, tuple(captured[name] for name in names)
