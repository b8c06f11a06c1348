"""DeepInversion: Yin et al., "Dreaming to Distill: Data-Free Knowledge Transfer via DeepInversion", CVPR 2020,
arXiv:1912.08795, as configured by Fang et al. (CMI, IJCAI 2021).

Each epoch the pixels of a batch of noise are fitted themselves:

    batch_norm + one_hot + adversarial (adaptive) + variation

all times their weights. The best of them join a pool, from which the student learns.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from datafree.distiller import Terms, differentiate_by
from datafree.inversion import competition, total_variation
from datafree.synthesis import Best, Inversion, weigh
from datafree.views import rolled
from utils.augment import denormalise
from utils.losses import cross_entropy
from utils.step import autocast


class DeepInversion(Inversion):
    def synthesise(self, random: torch.Generator) -> dict[str, Tensor]:
        params, facts = self.params, self.facts
        count, size = params.synthesis_batch_size, facts.image_size
        images = torch.randn(count, 3, size, size, generator=random).to(self.device).requires_grad_()
        targets = self.targets(count, random)
        optimizer = torch.optim.Adam([images], lr=params.synthesis_learning_rate, betas=(0.5, 0.99), fused=True)
        black, white = (facts.standardise(facts.mean.new_full((1, 3, 1, 1), value)) for value in (0, 1))
        best, terms = Best(), Terms()
        for _ in range(params.synthesis_steps):
            with autocast(self.device, self.dtype):
                seen = rolled(images, random, pixels=4, flip=facts.flips)
                logits, _, losses = self.look(seen)
                losses |= weigh(self._losses(seen, logits, targets))
            loss = sum(losses.values())
            differentiate_by([images], loss)
            best.offer(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(black, white))
            terms.add(losses)
        self.pool.add(denormalise(*best.tensors, facts.mean, facts.std), targets)
        return terms.average()

    def _losses(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        params = self.params
        return {"one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, targets)),
                "adversarial": (params.adversarial_weight, lambda: competition(logits, self.student(images))),
                "variation": (params.variation_weight, lambda: total_variation(images.float()))}
