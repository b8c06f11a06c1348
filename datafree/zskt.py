"""Zero-shot knowledge transfer: Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching",
NeurIPS 2019, arXiv:1905.09768, as configured by ABD.

A generator makes images on which student and teacher disagree, and the student learns from the teacher there:

    generator   minimise -KL(teacher || student)
    student     minimise  KL(teacher || student) + attention_weight * sum of attention losses

with KL the mean over batch and classes. A pseudo-batch is one draw of z: a step of the generator, then several of the
student on the images of the new generator. Those are the same for all of the student's steps, so they and what the
teacher says of them are computed once.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datafree.distiller import Defence, Facts, Terms, differentiate_by
from datafree.generator import build_generator
from datafree.losses import attention_loss, kl_element_mean
from datafree.vaccine import generator_penalty
from utils import seeds
from utils.augment import denormalise
from utils.convolution import fast_convolutions
from utils.errors import UserError
from utils.logger import progress_bar
from utils.params import ZSKTParams
from utils.step import autocast
from utils.supervised import build_adam, cosine, load_optimizer
from utils.training import Row


class ZSKT:
    """A `Learner` of the student. An epoch is `pseudo_batches` pseudo-batches."""

    def __init__(self, student: nn.Module, teacher: nn.Module, facts: Facts, params: ZSKTParams,
                 dtype: torch.dtype) -> None:
        """teacher: frozen. dtype: of the arithmetic of the networks."""
        self.student, self.teacher, self.facts, self.params, self.dtype = student, teacher, facts, params, dtype
        self.device = facts.mean.device
        if params.attention_weight:
            for network, key in ((student, "model_name"), (teacher, "teacher_model")):
                if "return_groups" not in inspect.signature(network.forward).parameters:
                    raise UserError(f'"attention_weight": {getattr(params, key)} has no groups of layers whose '
                                    "attention could be compared, as the wide ResNets have; 0 does without")
        self.generator = build_generator(params.latent_size, facts, params.seed)
        self.generator_optimizer = build_adam(self.generator, params.generator_learning_rate)
        self.optimizer = build_adam(student, params.learning_rate)
        self.defence = Defence(teacher, params, facts)
        self.images = params.pseudo_batches * params.student_steps * params.batch_size
        self.latest: Tensor | None = None  # images of the last pseudo-batch, as the networks see them

    def begin(self, say: Callable[[str], None]) -> None:
        self.defence.begin(say)

    def epoch(self, epoch: int, title: str) -> Row:
        params, count = self.params, self.params.pseudo_batches
        retrospects = self.defence.retrospects(epoch)
        if self.defence.begins_retrospection(epoch):
            self.optimizer = build_adam(self.student, params.sr_learning_rate)
        random = seeds.generator(params.seed, "latent", epoch)
        latent = torch.randn(count, params.batch_size, params.latent_size, generator=random).to(self.device)
        sr_random = self.defence.random(epoch)
        self.student.train()
        made, taught = Terms(), Terms()
        rate = self._set_rates(epoch, 0.0, retrospects)
        with progress_bar(self.images, title) as bar:
            for number in range(count):
                self._set_rates(epoch, number / count, retrospects)
                made.add(self.generator_step(latent[number]))
                images, logits, groups = self.answers(latent[number])
                for _ in range(params.student_steps):
                    taught.add(self.student_step(images, logits, groups, sr_random if retrospects else None))
                    bar.update(params.batch_size)
                if self.device.type == "cpu":  # elsewhere a look at every step would make the device wait
                    made.check(epoch, number + 1)
                    taught.check(epoch, number * params.student_steps + 1)
            self.latest = images
        made.check(epoch)
        taught.check(epoch)
        return {"learning_rate": rate, **made.means(), **taught.means()}

    def generator_step(self, latent: Tensor) -> dict[str, Tensor]:
        """One step of the generator on z (B, latent_size). Its loss and, if there is one, the vaccine's part in it."""
        with autocast(self.device, self.dtype):
            images = self.generator(latent)
            teacher_logits, student_logits = self.teacher(images), self.student(images)
            terms = {"generator_loss": -kl_element_mean(teacher_logits, student_logits,
                                                        temperature=self.params.temperature)}
            self.defence.observe(teacher_logits, images)
            if self.defence.shuffled:
                terms["vaccine"] = torch.zeros_like(terms["generator_loss"])
            if self.defence.coefficient:
                terms["vaccine"] = generator_penalty(teacher_logits, self.defence.shuffled(images),
                                                     coefficient=self.defence.coefficient)
        parameters = list(self.generator.parameters())
        differentiate_by(parameters, sum(terms.values()))
        nn.utils.clip_grad_norm_(parameters, self.params.clip_norm)
        self.generator_optimizer.step()
        return terms

    def answers(self, latent: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The generator's images of z, and what the teacher says of them: logits, and activations to compare with."""
        with torch.no_grad(), autocast(self.device, self.dtype):
            images = self.generator(latent).float()
            logits, groups = self._with_groups(self.teacher, images)
        return images, logits, groups

    def student_step(self, images: Tensor, teacher_logits: Tensor, teacher_groups: tuple[Tensor, ...],
                     random: torch.Generator | None) -> dict[str, Tensor]:
        """One step of the student. random: of self-retrospection, if it is on. The terms to log."""
        with autocast(self.device, self.dtype), fast_convolutions(self.device, self.dtype):
            logits, groups = self._with_groups(self.student, images)
            terms = {"kl": kl_element_mean(teacher_logits, logits, temperature=self.params.temperature)}
            loss = terms["kl"]
            if groups:
                terms["attention"] = attention_loss(groups, teacher_groups)
                loss = loss + self.params.attention_weight * terms["attention"]
        self.optimizer.zero_grad()
        loss.backward()
        if random is None:
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.params.clip_norm)
        else:
            terms |= self.defence.retrospect(self.student, self.teacher, images, random)
            norm = nn.utils.clip_grad_norm_(self.student.parameters(), torch.inf)
        self.optimizer.step()
        return {"loss": loss, **terms, "gradient_norm": norm}

    def pictures(self) -> dict[str, Tensor]:
        """Images of the last pseudo-batch, (B, 3, H, W) in [0, 1], and the perturbation."""
        if self.latest is None:
            return self.defence.pictures()
        latest = denormalise(self.latest[:64], self.facts.mean, self.facts.std)
        return {"synthetic": latest, **self.defence.pictures()}

    def state_dict(self) -> dict[str, Any]:
        return {"optim_dict": self.optimizer.state_dict(), "generator": self.generator.state_dict(),
                "generator_optim_dict": self.generator_optimizer.state_dict(), "defence": self.defence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optim_dict"])
        self.generator.load_state_dict(state["generator"])
        load_optimizer(self.generator_optimizer, state["generator_optim_dict"])
        self.defence.load_state_dict(state["defence"])

    def _with_groups(self, network: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return network(images, return_groups=True) if self.params.attention_weight else (network(images), ())

    def _set_rates(self, epoch: int, part: float, retrospects: bool) -> float:
        """Half a cosine each over all pseudo-batches; self-retrospection has one of its own. The student's rate."""
        params = self.params
        done = (epoch + part) / params.num_epochs
        rate = cosine(params.learning_rate, done)
        if retrospects:
            rate = self.defence.rate(epoch + part)
        for optimizer, value in ((self.optimizer, rate),
                                 (self.generator_optimizer, cosine(params.generator_learning_rate, done))):
            for group in optimizer.param_groups:
                group["lr"] = value
        return rate
