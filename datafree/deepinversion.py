"""DeepInversion: Yin et al., "Dreaming to Distill: Data-Free Knowledge Transfer via DeepInversion", CVPR 2020,
arXiv:1912.08795, as configured by Fang et al. (CMI, IJCAI 2021).

Each epoch the pixels of a batch of noise are fitted themselves:

    batch_norm + one_hot + adversarial (adaptive) + variation

all times their weights. The best of them join a pool, from which the student learns.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from datafree import REGISTRY
from datafree.distiller import Terms, differentiate_by, total
from datafree.inversion import competition, total_variation
from datafree.params import AdversarialWeight, BatchNormWeight, InversionParams, SynthesisRate, SynthesisSteps
from datafree.synthesis import Best, Inversion, weigh
from datafree.views import rolled
from utils.augment import denormalise
from utils.losses import cross_entropy
from utils.step import autocast


@REGISTRY.register("deepinversion", display_name="DeepInversion", source="Yin et al., CVPR 2020, arXiv:1912.08795")
class DeepInversion(Inversion):
    """DeepInversion: pixels are fitted, and kept."""

    class Params(InversionParams):
        synthesis_steps: SynthesisSteps = 1000
        synthesis_learning_rate: SynthesisRate = 0.1
        batch_norm_weight: BatchNormWeight = 10.0
        adversarial_weight: AdversarialWeight = 1.0
        variation_weight: float = Field(1e-3, ge=0, description="weight of the total variation")

    _params: Params

    def synthesise(self, random: torch.Generator) -> dict[str, Tensor]:
        params, facts = self._params, self._facts
        count, size = params.synthesis_batch_size, facts.image_size
        images = torch.randn(count, 3, size, size, generator=random).to(self._device).requires_grad_()
        targets = self._targets(count, random)
        optimizer = torch.optim.Adam([images], lr=params.synthesis_learning_rate, betas=(0.5, 0.99), fused=True)
        black, white = (facts.standardise(facts.mean.new_full((1, 3, 1, 1), value)) for value in (0, 1))
        best, terms = Best(), Terms()
        for _ in range(params.synthesis_steps):
            with autocast(self._device, self._dtype):
                seen = rolled(images, random, pixels=4, flip=facts.flips)
                logits, _, losses = self._look(seen)
                losses |= weigh(self._losses(seen, logits, targets))
            loss = total(losses)
            differentiate_by([images], loss)
            best.offer(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(black, white))
            terms.add(losses)
        made, = best.tensors
        self._pool.add(denormalise(made, facts.mean, facts.std), targets)
        return terms.average()

    def _losses(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        params = self._params
        return {"one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, targets)),
                "adversarial": (params.adversarial_weight, lambda: competition(logits, self._student(images))),
                "variation": (params.variation_weight, lambda: total_variation(images.float()))}
