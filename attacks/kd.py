"""Knowledge distillation (Hinton, Vinyals, Dean, 2015, arXiv:1503.02531), weighted as by Ma et al. (ICLR 2021):

    loss = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)
"""
from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack
from utils.data import Batch
from utils.losses import kd_terms
from utils.params import MethodParams


@REGISTRY.register("kd", display_name="KD", source="Hinton et al., 2015, arXiv:1503.02531")
class KD(Attack):
    """Student of the softened answers, and of the labels with weight 1 - `alpha`."""

    class Params(MethodParams):
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")
        alpha: float = Field(0.9, ge=0, le=1, description="weight of the KL term; the cross-entropy has 1 - `alpha`")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        return kd_terms(student(batch.images), answers, batch.labels, temperature=self.params.temperature,
                        alpha=self.params.alpha)
