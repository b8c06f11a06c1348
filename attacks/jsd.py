"""Distillation by the Jensen-Shannon divergence:

    loss = alpha * T^2 * JSD + (1 - alpha) * CE(student(x), y)
    JSD  = 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, p = softmax(answers / T), q = softmax(student(x) / T)

JSD is at most log 2, and finite for answers that are exactly 0, without a floor. For p close to q it is a quarter of
the KL divergence.

Not published as an attack; the defaults are those of `kd`.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import weighted_terms
from attacks.kd import KD
from utils.data import Batch
from utils.losses import at_least_float32, kl_from_log_probabilities


@REGISTRY.register("jsd", display_name="JSD", source="ours: KD with the divergence of Lin, 1991")
class JSD(KD):
    """Trains the student on the softened answers by the Jensen-Shannon divergence, and on the labels with weight
    1 - `alpha`."""

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits, temperature = student(batch.images), self.params.temperature
        log_p, log_q = ((at_least_float32(each) / temperature).log_softmax(1) for each in (answers, logits))
        jsd = temperature**2 * jensen_shannon(log_p, log_q)
        return weighted_terms(logits, batch, alpha=self.params.alpha, jsd=jsd)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD(p, q) in nats, mean over the batch, of log-probabilities (B, C); p may be exactly 0 (log p = -inf)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl_from_log_probabilities(log_p, log_m) + kl_from_log_probabilities(log_q, log_m)) / 2
