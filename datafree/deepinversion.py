"""DeepInversion: Yin et al., "Dreaming to Distill: Data-Free Knowledge Transfer via DeepInversion", CVPR 2020,
arXiv:1912.08795, as configured by Fang et al. (CMI, IJCAI 2021).

In each round (an epoch by default), the pixels of a batch of noise are optimized. The loss is

    batch_norm + one_hot + adversarial (adaptive) + variation

each times its weight. The images of the step with the least loss are added to a pool, from which the student learns.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from datafree import REGISTRY
from datafree.distiller import LossMeter, set_gradients, sum_losses
from datafree.inversion import adversarial_js, total_variation
from datafree.params import AdversarialWeight, BatchNormWeight, InversionParams, SynthesisRate, SynthesisSteps
from datafree.synthesis import Best, Inversion, weighted_losses
from datafree.views import random_roll
from utils.augment import denormalize
from utils.losses import cross_entropy
from utils.step import autocast


@REGISTRY.register("deepinversion", display_name="DeepInversion", source="Yin et al., CVPR 2020, arXiv:1912.08795")
class DeepInversion(Inversion):
    """DeepInversion: optimizes pixels and keeps the images in a pool."""

    class Params(InversionParams):
        synthesis_steps: SynthesisSteps = 1000
        synthesis_learning_rate: SynthesisRate = 0.1
        batch_norm_weight: BatchNormWeight = 10.0
        adversarial_weight: AdversarialWeight = 1.0
        variation_weight: float = Field(1e-3, ge=0, description="weight of the total variation loss")

    _params: Params

    def synthesize(self, random: torch.Generator) -> dict[str, Tensor]:
        params, spec = self._params, self._spec
        count, size = params.synthesis_batch_size, spec.image_size
        images = torch.randn(count, 3, size, size, generator=random).to(self._device).requires_grad_()
        targets = self._targets(count, random)
        optimizer = torch.optim.Adam([images], lr=params.synthesis_learning_rate, betas=(0.5, 0.99), fused=True)
        black, white = (spec.normalize(spec.mean.new_full((1, 3, 1, 1), value)) for value in (0, 1))
        best, meter = Best(), LossMeter()
        for _ in range(params.synthesis_steps):
            with autocast(self._device, self._dtype):
                seen = random_roll(images, random, pixels=4, flip=spec.flips)
                logits, _, losses = self._forward_teacher(seen)
                losses |= weighted_losses(self._losses(seen, logits, targets))
            loss = sum_losses(losses)
            set_gradients([images], loss)
            best.update(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(black, white))
            meter.add(losses)
        pixels, = best.tensors
        self._pool.add(denormalize(pixels, spec.mean, spec.std), targets)
        return meter.average()

    def _losses(self, images: Tensor, logits: Tensor, targets: Tensor) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        params = self._params
        return {"one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, targets)),
                "adversarial": (params.adversarial_weight, lambda: adversarial_js(logits, self._student(images))),
                "variation": (params.variation_weight, lambda: total_variation(images.float()))}
