"""Distillation by the reverse KL divergence, from the student to the teacher:

    loss = alpha * T^2 * KL(softmax(student(x) / T) || softmax(answers / T)) + (1 - alpha) * CE(student(x), y)

The reverse KL is mode-seeking: a student that puts its probability on one peak of the answer pays little for missing
the others. It is infinite for an answer that is exactly 0, so exact zeros count as probability 1e-6, before the
temperature, and the row is renormalized.

Not published as an attack; the defaults are those of `kd`.
"""
from __future__ import annotations

from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import weighted_terms
from attacks.kd import KD
from utils.data import Batch
from utils.losses import finite_log_probabilities, kl_divergence


@REGISTRY.register("reverse_kl", display_name="Reverse KL", source="ours: KD with the arguments of the KL exchanged")
class ReverseKL(KD):
    """Trains the student on the softened answers by the reverse KL divergence, and on the labels with weight
    1 - `alpha`."""

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits, temperature = student(batch.images), self.params.temperature
        kl = temperature**2 * kl_divergence(logits, finite_log_probabilities(answers), temperature=temperature)
        return weighted_terms(logits, batch, alpha=self.params.alpha, reverse_kl=kl)
