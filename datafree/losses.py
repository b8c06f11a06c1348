"""What the data-free methods measure between teacher and student, as pure functions of tensors.

Three conventions of one Kullback-Leibler divergence occur in the papers: its mean over the batch and its value per
sample (both in `utils.losses`), and its mean over batch *and* classes. All are from log-probabilities and in float32 at
least, so that the gradients of both arguments are finite; a generator needs both.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.losses import at_least_float32, kl_divergence


def kl_element_mean(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats, mean over batch and classes: the convention of ZSKT, 1/C of the usual one."""
    return kl_divergence(p_logits, q_logits, temperature=temperature) / p_logits.shape[1]


def attention_map(activation: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Where a layer is active: the mean over channels of the squared activation (B, C, H, W), as unit vectors (B, HW).

    size: a smaller (H, W) to average the map to. Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017,
    arXiv:1612.03928.
    """
    energy = at_least_float32(activation).square().mean(1)
    if size is not None and size != energy.shape[1:]:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1))


def attention_loss(student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
    """The sum over layers of the mean squared difference of the attention maps, over batch and positions.

    Activations (B, C, H, W). Channels of student and teacher may differ, and so may sizes: the larger map is averaged
    to the size of the smaller. ValueError for another number of layers.
    """
    losses = []
    for student, teacher in zip(student_stages, teacher_stages, strict=True):
        height, width = map(min, student.shape[2:], teacher.shape[2:])
        student_map, teacher_map = (attention_map(stage, (height, width)) for stage in (student, teacher))
        losses.append(F.mse_loss(student_map, teacher_map))
    return torch.stack(losses).sum()
