"""Losses between teacher and student of the data-free methods, as pure functions.

The papers reduce the KL divergence in three ways: mean over the batch, no reduction (both in `utils.losses`), and mean
over batch and classes. All are computed from log-probabilities in at least float32, so that the gradients by
both arguments are finite; a generator needs both.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.losses import at_least_float32, kl_divergence


def kl_element_mean(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats of logits (B, C), mean over batch and classes: 1/C of the usual value, as in ZSKT."""
    return kl_divergence(p_logits, q_logits, temperature=temperature) / p_logits.shape[1]


def attention_map(activation: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Attention map of an activation (B, C, H, W): the mean over channels of its square, as unit vectors (B, HW).

    size: pool the map to a smaller (H, W) first. Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017,
    arXiv:1612.03928.
    """
    energy = at_least_float32(activation).square().mean(1)
    if size is not None and size != energy.shape[1:]:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1))


def attention_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference (over batch and positions) between attention maps.

    Activations (B, C, H, W). Student and teacher may differ in channels and size: the larger map is pooled to the size
    of the smaller. Raises ValueError if the numbers of layers differ.
    """
    losses = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        height, width = map(min, student.shape[2:], teacher.shape[2:])
        student_map, teacher_map = (attention_map(stage, (height, width)) for stage in (student, teacher))
        losses.append(F.mse_loss(student_map, teacher_map))
    return torch.stack(losses).sum()
