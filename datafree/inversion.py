"""Losses that synthetic images minimize, as pure functions.

Sources: Chen et al. (DAFL, ICCV 2019, arXiv:1904.01186), Yin et al. (DeepInversion, CVPR 2020, arXiv:1912.08795), Choi
et al. (DFQ, CVPR workshops 2020, arXiv:2005.04136) and Fang et al. (CMI, IJCAI 2021, arXiv:2105.08584), as in the code
of Fang et al.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.features import Captured
from utils.losses import at_least_float32, kl_per_sample


def adversarial_kl(teacher_logits: Tensor, student_logits: Tensor, *, agreeing_only: bool = False) -> Tensor:
    """Negative mean of KL(teacher || student), in nats: seeks images on which the student differs (DFQ).

    Logits (B, C). agreeing_only: images with different predictions of teacher and student count as 0 (CMI).
    """
    kl = kl_per_sample(teacher_logits, student_logits, temperature=1)
    if agreeing_only:
        kl = torch.where(teacher_logits.argmax(1) == student_logits.argmax(1), kl, 0)
    return -kl.mean()


def adversarial_js(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 3) -> Tensor:
    """1 - mean Jensen-Shannon divergence, in nats, of logits (B, C): the adaptive term of DeepInversion.

    As in the paper, (KL(P || M) + KL(Q || M)) / 2 with M = (P + Q) / 2. The code of Fang et al. exchanges the arguments
    of each KL. The gradient of that form is equal for similar outputs, and several times as large for confident,
    different ones: KL(M || P) is unbounded, whereas this divergence is at most log 2.
    """
    p, q = (F.softmax(at_least_float32(logits) / temperature, dim=1) for logits in (teacher_logits, student_logits))
    log_middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny).log()
    log_p, log_q = (F.log_softmax(at_least_float32(logits) / temperature, dim=1)
                    for logits in (teacher_logits, student_logits))
    divergence = (p * (log_p - log_middle) + q * (log_q - log_middle)).sum(1) / 2
    return 1 - divergence.mean()


def information_entropy_loss(logits: Tensor) -> Tensor:
    """Negative entropy, in nats, of the mean prediction of logits (B, C); the minimum, -log C, is balanced classes."""
    mean = F.softmax(at_least_float32(logits), dim=1).mean(0)
    return torch.special.xlogy(mean, mean).sum()


def activation_loss(features: Tensor) -> Tensor:
    """Negative mean of |features|, (B, D), inputs of the classifier, which are larger for real images (DAFL)."""
    return -at_least_float32(features).abs().mean()


def total_variation(images: Tensor) -> Tensor:
    """Sum over four directions of the mean absolute difference between neighboring pixels, images (B, C, H, W).

    A mean: the value does not depend on the batch size, and weights fit this scale. The alternative of DeepInversion's
    authors, the L2 norm of all differences, has about sqrt(B C H W) times its gradient.
    """
    return ((images[..., :, 1:] - images[..., :, :-1]).abs().mean()
            + (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
            + (images[..., 1:, 1:] - images[..., :-1, :-1]).abs().mean()
            + (images[..., 1:, :-1] - images[..., :-1, 1:]).abs().mean())


def batch_norm_loss(captured: Captured) -> Tensor:
    """Distance between batch statistics and running statistics, for batch norms whose inputs were captured: the sum of
    ||mean - running mean||_2 + ||variance - running variance||_2, with the variance divided by N.

    Yin et al., "Dreaming to Distill", CVPR 2020, arXiv:1912.08795, eq. 4, without the squares. Raises ValueError if a
    captured module is not a batch norm with running statistics.
    """
    terms = []
    for name, module, values in captured.calls:
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
            raise ValueError(f"{name} is not a batch norm with running statistics")
        variance, mean = torch.var_mean(at_least_float32(values), dim=(0, 2, 3), correction=0)
        terms += [(mean - module.running_mean).norm(), (variance - module.running_var).norm()]
    return torch.stack(terms).sum()
