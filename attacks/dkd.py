"""Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv:2203.08679).

    loss = CE(student(x), y) + w(epoch) * (alpha * TCKD + beta * NCKD)
    TCKD = T^2 * KL(teacher || student) of the pair (p_y, 1 - p_y) at temperature T
    NCKD = T^2 * KL(teacher || student) over the classes other than y, renormalized, at temperature T

w rises linearly from 0 to 1 over `warmup_epochs`. In plain distillation NCKD has the weight 1 - p_y of the teacher, so
a confident teacher says little about the other classes; DKD removes that factor.
"""
from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, AttackParams, classes
from utils.data import Batch
from utils.losses import at_least_float32, cross_entropy, finite_log_probabilities, kl_from_log_probabilities


@REGISTRY.register("dkd", display_name="DKD", source="Zhao et al., CVPR 2022, arXiv:2203.08679")
class DKD(Attack):
    """Splits the KL term into two with separate weights: the class against all others, and the distribution over the
    others. Adds a cross-entropy with the class: the label or, for a thief without labels, the top class of the
    answer."""

    class Params(AttackParams):
        reads_class = True
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in both KL terms")
        alpha: float = Field(1.0, ge=0, description="weight of TCKD, the KL term of the true class against the others")
        beta: float = Field(
            8.0, ge=0, description="weight of NCKD, the KL term among the classes other than the true one")
        warmup_epochs: float = Field(
            20.0, ge=0, description="epochs over which the weight of both KL terms rises linearly from 0 to 1")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        params = self.params
        logits, labels = student(batch.images), classes(batch, answers)
        target, other = decoupled_kl(answers, logits, labels, temperature=params.temperature)
        terms = {"cross_entropy": cross_entropy(logits, labels), "tckd": target, "nckd": other}
        weight = (batch.epoch / params.warmup_epochs).clamp(max=1) if params.warmup_epochs else 1.0
        return {"loss": terms["cross_entropy"] + weight * (params.alpha * target + params.beta * other), **terms}


def decoupled_kl(teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *,
                 temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of logits (B, C) and labels (B,): two scalars, means over the batch, T^2 included.

    -inf in the teacher's logits is allowed: exact zeros count as probability 1e-6, because zeros in all other classes
    cannot be renormalized.
    """
    log_teacher = (finite_log_probabilities(teacher_logits) / temperature).log_softmax(1)
    log_student = (at_least_float32(student_logits) / temperature).log_softmax(1)
    true, others = labels[:, None], _other_classes(labels, log_student.shape[1])
    pairs, tails = zip(*(_split(log_p, true, others) for log_p in (log_teacher, log_student)), strict=True)
    return temperature**2 * kl_from_log_probabilities(*pairs), temperature**2 * kl_from_log_probabilities(*tails)


def _other_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Classes other than the true one, (B, C - 1). A boolean mask would synchronize a GPU."""
    classes = torch.arange(num_classes - 1, device=labels.device)
    return classes + (classes >= labels[:, None])


def _split(log_p: Tensor, true: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Split log-probabilities (B, C) into those of (true class, any other), (B, 2), and of the others, (B, C - 1)."""
    tail = log_p.gather(1, others)
    return torch.cat([log_p.gather(1, true), tail.logsumexp(1, keepdim=True)], dim=1), tail.log_softmax(1)
