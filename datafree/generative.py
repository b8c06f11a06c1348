"""Methods whose one generator learns along with the student:

    DAFL   Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, arXiv:1904.01186: images of which the
           teacher is sure, that activate it, of all classes alike
    DFQ    Choi et al., "Data-Free Network Quantization With Adversarial Knowledge Distillation", CVPR workshops 2020,
           arXiv:2005.04136: the same with its batch norms' statistics, and where the student differs

as configured by Fang et al. (CMI, IJCAI 2021):

    batch_norm + one_hot + activation + balance + adversarial

all times their weights, of which the two set different ones to 0. The student is shown new images of the generator in
the mode in which it learns, with the statistics of the batch: running ones lag behind a generator that changes.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datafree.distiller import Facts, Terms, differentiate_by
from datafree.generator import build_generator
from datafree.inversion import disagreement, imbalance, inactivity
from datafree.synthesis import Synthesis, weigh
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.params import GenerativeParams
from utils.step import autocast
from utils.supervised import load_optimizer


class Generative(Synthesis):
    def __init__(self, student: nn.Module, teacher: nn.Module, facts: Facts, params: GenerativeParams,
                 dtype: torch.dtype) -> None:
        super().__init__(student, teacher, facts, params, dtype)
        self.generator = build_generator(params.latent_size, facts, params.seed, width=256, pixels=True)
        if params.activation_weight and not self.has_classifier:
            raise UserError(f'"activation_weight": {params.teacher_model} has no linear layer; 0 does without')
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=params.synthesis_learning_rate, betas=(0.5, 0.999), fused=True)
        self.latest: Tensor | None = None  # the last images, pixels in [0, 1]

    def synthesise(self, random: torch.Generator) -> dict[str, Tensor]:
        parameters, terms = list(self.generator.parameters()), Terms()
        for _ in range(self.params.synthesis_steps):
            with autocast(self.device, self.dtype):
                pixels = self._make(self.params.synthesis_batch_size, random)
                losses = self._losses(self.facts.standardise(pixels))
            differentiate_by(parameters, sum(losses.values()))
            self.generator_optimizer.step()
            terms.add(losses)
        return terms.average()

    def _losses(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted losses of images (B, 3, H, W) as the networks see them."""
        params = self.params
        logits, seen, losses = self.look(images)
        return losses | weigh({
            "one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, logits.argmax(1))),
            "activation": (params.activation_weight, lambda: inactivity(seen.penultimate)),
            "balance": (params.balance_weight, lambda: imbalance(logits)),
            "adversarial": (params.adversarial_weight, lambda: disagreement(logits, self.student(images))),
        })

    def _make(self, count: int, random: torch.Generator) -> Tensor:
        """New images of pixels in [0, 1]: float32 (count, 3, H, W)."""
        latent = torch.randn(count, self.params.latent_size, generator=random)
        return self.generator(latent.to(self.device)).float()

    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        return map(self.facts.standardise, self._samples(random))

    def _samples(self, random: torch.Generator) -> Iterator[Tensor]:
        for _ in range(self.student_steps):
            with torch.no_grad(), autocast(self.device, self.dtype):
                self.latest = self._make(self.params.batch_size, random)
            yield self.latest

    def pictures(self) -> dict[str, Tensor]:
        """Images of the last step, (B, 3, H, W) in [0, 1], and the perturbation."""
        latest = {} if self.latest is None else {"synthetic": self.latest[:64]}
        return {**latest, **self.defence.pictures()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.state_dict(),
                "generator_optim_dict": self.generator_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        load_optimizer(self.generator_optimizer, state["generator_optim_dict"])
