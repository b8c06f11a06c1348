"""Losses of the stages as pure functions of logits (B, C) and labels (B,).

All are means over the batch, computed in float32 or more: bfloat16 and float16 logits are promoted, float64 stays.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-6  # probability that replaces an exact 0 if a loss or metric would be infinite


def at_least_float32(logits: Tensor) -> Tensor:
    """Promote half-precision logits to float32: with T^2 of up to 400, eight bits of mantissa are not enough."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, C) and class indices (B,), in nats. label_smoothing: probability of the target
    that is spread evenly over all classes (Szegedy et al., CVPR 2016)."""
    return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=label_smoothing)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats, mean over the batch, of p = softmax(p_logits / T) and q = softmax(q_logits / T).

    The gradient reaches both arguments and is finite within the range of float32, because everything is computed from
    log-probabilities, sum p (log p - log q). `F.kl_div(log q, p)` differentiates p log p through log(p) instead, which
    gives NaN once a p underflows to zero; the nasty loss, which rewards such p, then ends with NaN weights.
    """
    log_p = F.log_softmax(at_least_float32(p_logits) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(q_logits) / temperature, dim=1)
    return kl_from_log_probabilities(log_p, log_q)


def finite_log_probabilities(answers: Tensor) -> Tensor:
    """Log-probabilities (B, C) of answers that may hold -inf: exact zeros count as probability 1e-6, the row
    renormalized. Other entries keep their ratios."""
    log_p = at_least_float32(answers).log_softmax(1)
    return log_p.masked_fill(log_p.isneginf(), math.log(FLOOR)).log_softmax(1)


def kl_from_log_probabilities(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, mean over the batch, of log-probabilities (B, C). p may be exactly 0 (log p = -inf), where
    0 log 0 = 0; q may not."""
    return F.kl_div(log_q, _without_infinity(log_p), reduction="batchmean", log_target=True)


def kl_per_sample(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats of each sample, (B,), for logits (B, C); its mean is `kl_divergence`."""
    log_p = F.log_softmax(at_least_float32(p_logits) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(q_logits) / temperature, dim=1)
    return F.kl_div(log_q, _without_infinity(log_p), reduction="none", log_target=True).sum(1)


def _without_infinity(log_p: Tensor) -> Tensor:
    """Replace -inf by the lowest finite values, since 0 * -inf is NaN."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min / 2)


def kd_terms(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *,
             temperature: float, alpha: float) -> dict[str, Tensor]:
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531), weighted as by Ma et al. (2021):

        loss = alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE(student, labels)

    Returns the loss and its two logged terms: `kl` (T^2 included) and `cross_entropy`.
    """
    kl = temperature**2 * kl_divergence(teacher_logits, student_logits, temperature=temperature)
    ce = cross_entropy(student_logits, labels)
    return {"loss": alpha * kl + (1 - alpha) * ce, "kl": kl, "cross_entropy": ce}


def nasty_terms(nasty_logits: Tensor, adversary_logits: Tensor, labels: Tensor, *,
                temperature: float, weight: float) -> dict[str, Tensor]:
    """Self-undermining knowledge distillation (Ma et al., ICLR 2021, arXiv 2105.07381, eq. 2):

        loss = CE(nasty, labels) - weight * T^2 * KL(nasty || adversary)

    The direction of the KL keeps the loss bounded below for a fixed adversary: KL(nasty || adversary) is at most
    max_c -log p_adversary(c), while KL(adversary || nasty) grows without limit. Returns the loss and its two
    logged terms: `kl` (T^2 included) and `cross_entropy`.
    """
    kl = temperature**2 * kl_divergence(nasty_logits, adversary_logits, temperature=temperature)
    ce = cross_entropy(nasty_logits, labels)
    return {"loss": ce - weight * kl, "kl": kl, "cross_entropy": ce}


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *,
            temperature: float, alpha: float) -> Tensor:
    """Loss of `kd_terms`, a scalar."""
    return kd_terms(student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha)["loss"]


def nasty_loss(nasty_logits: Tensor, adversary_logits: Tensor, labels: Tensor, *,
               temperature: float, weight: float) -> Tensor:
    """Loss of `nasty_terms`, a scalar."""
    return nasty_terms(nasty_logits, adversary_logits, labels, temperature=temperature, weight=weight)["loss"]
