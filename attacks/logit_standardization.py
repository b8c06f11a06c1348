"""Logit standardization (Sun et al., CVPR 2024, arXiv:2403.01427): distillation of z-scores.

    loss = alpha * multiplier * T^2 * KL(softmax(Z(answers) / T) || softmax(Z(student(x)) / T))
           + (1 - alpha) * CE(student(x), y)
    Z(z) = (z - mean z) / (1e-7 + standard deviation of z), over the classes of an image, with C - 1 degrees of freedom

The defaults are the published loss, 9 T^2 KL + 0.1 CE. z-scores keep the order of the logits, but not their scale, so
the teacher's confidence is lost. A nearly one-hot answer has the top z-score (C - 1) / sqrt(C): softmax(Z / 2) has a
maximum of 0.35 / 0.60 / 0.86 for 10 / 100 / 200 classes.

Answers need not be logits: log-probabilities have the same z-scores. Exact zeros count as probability 1e-6.
"""
from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, weighted_terms
from utils.data import Batch
from utils.losses import at_least_float32, finite_log_probabilities, kl_divergence


@REGISTRY.register("logit_standardization", display_name="Logit standardization",
                   source="Sun et al., CVPR 2024, arXiv:2403.01427")
class LogitStandardization(Attack):
    """Trains the student on the z-scores of the answers, and on the labels with weight 1 - `alpha`."""

    class Params(WeightedParams):
        temperature: float = Field(2.0, gt=0, description="temperature T of the softened z-scores in the KL term")
        multiplier: float = Field(
            10.0, ge=0,
            description="factor of the KL term in addition to `alpha`; 10 and `alpha` 0.9 give the published weight 9")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        params, logits = self.params, student(batch.images)
        kl = kl_divergence(z_scores(finite_log_probabilities(answers)), z_scores(logits),
                           temperature=params.temperature)
        return weighted_terms(logits, batch, alpha=params.alpha, kl=params.multiplier * params.temperature**2 * kl)


def z_scores(logits: Tensor) -> Tensor:
    """z-scores (B, C) of finite logits (B, C), over the classes of each row."""
    logits = at_least_float32(logits)
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))
