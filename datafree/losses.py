"""What the data-free methods measure between teacher and student, as pure functions of tensors.

Three conventions of one Kullback-Leibler divergence occur in the papers: its mean over the batch (`utils.losses`), its
value per sample, and its mean over batch *and* classes. All are from log-probabilities and in float32 at least, so
that the gradients of both arguments are finite; a generator needs both.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.losses import at_least_float32, kl_divergence


def kl_per_sample(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats of each sample, (B,), for logits (B, C); its mean is `utils.losses.kl_divergence`."""
    log_p = F.log_softmax(at_least_float32(p_logits) / temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(q_logits) / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def kl_element_mean(p_logits: Tensor, q_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(p || q) in nats, mean over batch and classes: the convention of ZSKT, 1/C of the usual one."""
    return kl_divergence(p_logits, q_logits, temperature=temperature) / p_logits.shape[1]


def attention_map(activation: Tensor) -> Tensor:
    """Where a layer is active: the mean over channels of the squared activation (B, C, H, W), as unit vectors (B, HW).

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928.
    """
    return F.normalize(at_least_float32(activation).square().mean(1).flatten(1))


def attention_loss(student_groups: Sequence[Tensor], teacher_groups: Sequence[Tensor]) -> Tensor:
    """The sum over layers of the mean squared difference of the attention maps, over batch and positions.

    Activations (B, C, H, W); the channels of student and teacher may differ. ValueError for another number of layers.
    """
    pairs = zip(student_groups, teacher_groups, strict=True)
    return torch.stack([F.mse_loss(attention_map(student), attention_map(teacher)) for student, teacher in pairs]).sum()
