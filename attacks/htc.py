"""High-temperature composition (HTC; Jandial et al., ECCV 2022), with the student at temperature 1:

    loss = alpha * KL(softmax(answers / T) || softmax(student(x))) + (1 - alpha) * CE(student(x), y)

At a high temperature the answers are nearly uniform: 1/C + (z - mean z) / (C T) for logits z and C classes. The loss is
then label smoothing with a small contribution of the teacher, so compare it with training on smoothed labels.

The authors published no code. This is the form of a public reimplementation (edaylmz/distilling), without a factor
T^2. `htc_matched` is the other common form.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, weighted_terms
from utils.data import Batch
from utils.losses import at_least_float32, kl_from_log_probabilities


@REGISTRY.register("htc", display_name="HTC", source="Jandial et al., ECCV 2022")
class HTC(Attack):
    """Trains the student, at temperature 1, on answers softened by a high temperature, and on the labels with weight
    1 - `alpha`."""

    class Params(WeightedParams):
        published: ClassVar[dict[str, dict[str, float]]] = {"cifar100": {"temperature": 70.0}}
        temperature: float = Field(
            50.0, gt=0, description="temperature T of the teacher's softened outputs; the student's temperature is 1; "
                                    "70 for CIFAR-100")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits = student(batch.images)
        log_teacher = (at_least_float32(answers) / self.params.temperature).log_softmax(1)
        kl = kl_from_log_probabilities(log_teacher, at_least_float32(logits).log_softmax(1))
        return weighted_terms(logits, batch, alpha=self.params.alpha, kl=kl)
