"""Contrastive model inversion: Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation",
IJCAI 2021, arXiv:2105.08584, as configured by ABD.

In each round (an epoch by default), a reinitialized generator and new latent vectors are optimized to make one batch of
images. The loss is

    batch_norm + one_hot + adversarial + contrast

each times its weight: images with the teacher's batch-norm statistics and a confident prediction of the teacher, on
which the student differs, and that differ from each other and from earlier images. The images of the step with the
least loss are added to a pool, from which the student learns.
"""
from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from datafree import REGISTRY
from datafree.contrast import MemoryBank, ProjectionHead, contrast_loss, instance_means
from datafree.distiller import DataSpec, LossMeter, set_gradients, sum_losses
from datafree.generator import build_generator
from datafree.inversion import adversarial_kl
from datafree.params import AdversarialWeight, BatchNormWeight, InversionParams, LatentSize, SynthesisSteps
from datafree.synthesis import Best, Inversion, weighted_losses
from datafree.views import random_crop, random_resized_crop
from model.features import capture_inputs
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.step import autocast
from utils.supervised import load_optimizer


@REGISTRY.register("cmi", display_name="CMI", source="Fang et al., IJCAI 2021, arXiv:2105.08584")
class CMI(Inversion):
    """Contrastive model inversion."""

    class Params(InversionParams):
        synthesis_steps: SynthesisSteps = 200
        batch_norm_weight: BatchNormWeight = 1.0
        adversarial_weight: AdversarialWeight = 0.5
        latent_size: LatentSize = 256
        contrast_weight: float = Field(0.8, ge=0, description="weight of the contrastive loss")
        contrast_temperature: float = Field(0.1, gt=0, description="temperature of the contrastive loss")
        negatives: int = Field(4096, ge=0, description="earlier images in the contrastive loss of a batch")
        bank_size: int = Field(40_960, ge=1, description="capacity of the memory bank of earlier images")
        head_learning_rate: float = Field(1e-3, gt=0, description="learning rate of the projection head")

    _params: Params

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: Params,
                 dtype: torch.dtype) -> None:
        super().__init__(student, teacher, spec, params, dtype)
        self._generator = build_generator(params.latent_size, spec, params.seed, pixels=True)
        if not self._num_features:
            raise UserError(f'"method": cmi compares the inputs of batch norms, but {params.teacher_model} has none: '
                            "choose another method")
        self._head = ProjectionHead(self._num_features).to(self._device)
        self._head_optimizer = torch.optim.Adam(self._head.parameters(), lr=params.head_learning_rate, fused=True)
        self._bank = MemoryBank(params.bank_size, self._num_features, self._device)

    def synthesize(self, random: torch.Generator) -> dict[str, Tensor]:
        params, count = self._params, self._params.synthesis_batch_size
        latent = torch.randn(count, params.latent_size, generator=random).to(self._device).requires_grad_()
        targets = self._targets(count, random)
        self._generator.reinitialize(random)
        trainable: list[Tensor] = [*self._generator.parameters(), latent]
        optimizer = torch.optim.Adam(trainable, lr=params.synthesis_learning_rate, betas=(0.5, 0.999), fused=True)
        head_parameters: list[Tensor] = list(self._head.parameters()) if params.contrast_weight else []
        best, meter = Best(), LossMeter()
        for _ in range(params.synthesis_steps):
            with autocast(self._device, self._dtype):
                pixels = self._generator(latent).float()
                losses, features = self._losses(pixels, targets, random)
            loss = sum_losses(losses)
            set_gradients(trainable + head_parameters, loss)
            optimizer.step()
            self._head_optimizer.step()
            best.update(loss, pixels, features)
            meter.add(losses)
        pixels, features = best.tensors
        self._pool.add(pixels, targets)
        self._bank.add(features)
        return meter.average()

    def _losses(self, pixels: Tensor, targets: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted losses of pixels in [0, 1], (B, 3, H, W), and features (B, 2, D) of a local and a global view."""
        params, flip = self._params, self._spec.flips
        global_view = self._spec.normalize(random_crop(pixels, random, padding=pixels.shape[2] // 8, flip=flip))
        local_view = self._spec.normalize(random_resized_crop(pixels, random, scale=(0.25, 1.0), flip=flip))
        logits, inputs, losses = self._forward_teacher(global_view)
        with capture_inputs(self._teacher, *self._batch_norms) as local_inputs:
            self._teacher(local_view)
        features = torch.stack([instance_means(local_inputs), instance_means(inputs)], dim=1)
        negatives = self._bank.draw(params.negatives, random)
        return losses | weighted_losses({
            "one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, targets)),
            "adversarial": (params.adversarial_weight,
                            lambda: adversarial_kl(logits, self._student(global_view), agreeing_only=True)),
            "contrast": (params.contrast_weight,
                         lambda: contrast_loss(self._head, features[:, 0], features[:, 1], negatives,
                                               temperature=params.contrast_temperature)),
        }), features.detach()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self._generator.state_dict(), "head": self._head.state_dict(),
                "head_optim_dict": self._head_optimizer.state_dict(), "bank": self._bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.load_state_dict(state["generator"])
        self._head.load_state_dict(state["head"])
        load_optimizer(self._head_optimizer, state["head_optim_dict"])
        self._bank.load_state_dict(state["bank"])
