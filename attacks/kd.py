"""Knowledge distillation (Hinton, Vinyals, Dean, 2015, arXiv:1503.02531), weighted as in Ma et al. (ICLR 2021):

    loss = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, weighted_terms
from utils.data import Batch
from utils.losses import kl_divergence


@REGISTRY.register("kd", display_name="KD", source="Hinton et al., 2015, arXiv:1503.02531")
class KD(Attack):
    """Trains the student on the softened answers, and on the labels with weight 1 - `alpha`."""

    class Params(WeightedParams):
        published: ClassVar[dict[str, dict[str, float]]] = {
            "cifar100": {"temperature": 20.0}, "tiny_imagenet": {"temperature": 20.0}}
        temperature: float = Field(
            4.0, gt=0, description="temperature T of the softened outputs in the KL term; 20 for CIFAR-100 and "
                                   "Tiny-ImageNet")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits, temperature = student(batch.images), self.params.temperature
        kl = temperature**2 * kl_divergence(answers, logits, temperature=temperature)
        return weighted_terms(logits, batch, alpha=self.params.alpha, kl=kl)
