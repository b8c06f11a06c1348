"""Methods that train a generator along with the student, as configured by Fang et al. (CMI, IJCAI 2021):

    DAFL   Chen et al., "Data-Free Learning of Student Networks", ICCV 2019, arXiv:1904.01186: images with confident
           predictions, large activations and balanced classes
    DFQ    Choi et al., "Data-Free Network Quantization With Adversarial Knowledge Distillation", CVPR workshops 2020,
           arXiv:2005.04136: confident, balanced images with the teacher's batch-norm statistics, on which the student
           differs

The generator's loss is

    batch_norm + one_hot + activation + balance + adversarial

each times its weight; the defaults of the two methods set different weights to 0. The student learns from new images of
the generator in training mode, whose batch norms use batch statistics: running statistics lag behind a generator that
changes.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datafree import REGISTRY
from datafree.distiller import DataSpec, LossMeter, set_gradients, sum_losses
from datafree.generator import build_generator
from datafree.inversion import activation_loss, adversarial_kl, information_entropy_loss
from datafree.params import ActivationWeight, AdversarialWeight, BatchNormWeight, GenerativeParams, StudentSteps
from datafree.synthesis import Synthesis, weighted_losses
from model.features import capture_inputs, classifier
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.step import autocast
from utils.supervised import load_optimizer


class Generative(Synthesis):
    """Base class of methods that train a generator along with the student."""

    _params: GenerativeParams

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: GenerativeParams,
                 dtype: torch.dtype) -> None:
        super().__init__(student, teacher, spec, params, dtype)
        self._generator = build_generator(params.latent_size, spec, params.seed, width=256, pixels=True)
        self._classifier_layer: list[str] = []  # the layer whose input enters the activation loss
        if params.activation_weight:
            name = classifier(teacher, spec.image_size)
            if name is None:
                raise UserError(f'"activation_weight": {params.teacher_model} has no linear layer or convolution that '
                                "computes its logits: set it to 0")
            self._classifier_layer = [name]
        self._generator_optimizer = torch.optim.Adam(
            self._generator.parameters(), lr=params.synthesis_learning_rate, betas=(0.5, 0.999), fused=True)
        self._latest: Tensor | None = None  # images of the last step, pixels in [0, 1]

    def synthesize(self, random: torch.Generator) -> dict[str, Tensor]:
        parameters, meter = list(self._generator.parameters()), LossMeter()
        for _ in range(self._params.synthesis_steps):
            with autocast(self._device, self._dtype):
                pixels = self._generate(self._params.synthesis_batch_size, random)
                losses = self._losses(self._spec.normalize(pixels))
            set_gradients(parameters, sum_losses(losses))
            self._generator_optimizer.step()
            meter.add(losses)
        return meter.average()

    def _losses(self, images: Tensor) -> dict[str, Tensor]:
        """Weighted losses of normalized images (B, 3, H, W)."""
        params = self._params
        with capture_inputs(self._teacher, *self._classifier_layer) as captured:
            logits, _, losses = self._forward_teacher(images)
        return losses | weighted_losses({
            "one_hot": (params.one_hot_weight, lambda: cross_entropy(logits, logits.argmax(1))),
            "activation": (params.activation_weight, lambda: activation_loss(captured.calls[-1].value)),
            "balance": (params.balance_weight, lambda: information_entropy_loss(logits)),
            "adversarial": (params.adversarial_weight, lambda: adversarial_kl(logits, self._student(images))),
        })

    def _generate(self, count: int, random: torch.Generator) -> Tensor:
        """Make images, float32 (count, 3, H, W), pixels in [0, 1]."""
        latent = torch.randn(count, self._params.latent_size, generator=random)
        return self._generator(latent.to(self._device)).float()

    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        return map(self._spec.normalize, self._samples(random))

    def _samples(self, random: torch.Generator) -> Iterator[Tensor]:
        for _ in range(self._student_steps):
            with torch.no_grad(), autocast(self._device, self._dtype):
                self._latest = self._generate(self._params.batch_size, random)
            yield self._latest

    def epoch_images(self) -> dict[str, Tensor]:
        """Images of the last step, (B, 3, H, W) in [0, 1], and the last perturbation of self-retrospection."""
        latest = {} if self._latest is None else {"synthetic": self._latest[:64]}
        return {**latest, **self.defense.epoch_images()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self._generator.state_dict(),
                "generator_optim_dict": self._generator_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.load_state_dict(state["generator"])
        load_optimizer(self._generator_optimizer, state["generator_optim_dict"])


@REGISTRY.register("dafl", display_name="DAFL", source="Chen et al., ICCV 2019, arXiv:1904.01186")
class DAFL(Generative):
    """DAFL: a generator of confident, activated and balanced images."""

    class Params(GenerativeParams):
        activation_weight: ActivationWeight = 1e-3


@REGISTRY.register("dfq", display_name="DFQ", source="Choi et al., CVPR workshops 2020, arXiv:2005.04136")
class DFQ(Generative):
    """DFQ, without its quantization: a generator that also matches batch norms and seeks the student's errors."""

    class Params(GenerativeParams):
        student_steps: StudentSteps = 10
        batch_norm_weight: BatchNormWeight = 1.0
        adversarial_weight: AdversarialWeight = 1.0
