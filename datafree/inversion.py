"""Losses of images that are made for a teacher, as pure functions; all are minimised by the images.

The sources are Chen et al. (DAFL, ICCV 2019, arXiv:1904.01186), Yin et al. (DeepInversion, CVPR 2020,
arXiv:1912.08795), Choi et al. (DFQ, CVPR workshops 2020, arXiv:2005.04136) and Fang et al. (CMI, IJCAI 2021,
arXiv:2105.08584), in the forms that the latter's programs gave them.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.features import Captured
from utils.losses import at_least_float32, kl_per_sample


def adversarial_kl(teacher_logits: Tensor, student_logits: Tensor, *, agreeing_only: bool = False) -> Tensor:
    """-mean of KL(teacher || student): the images seek where the student has not learned yet (DFQ).

    agreeing_only: images on which the two predict different classes count as 0 (CMI).
    """
    kl = kl_per_sample(teacher_logits, student_logits, temperature=1)
    if agreeing_only:
        kl = torch.where(teacher_logits.argmax(1) == student_logits.argmax(1), kl, 0)
    return -kl.mean()


def adversarial_js(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 3) -> Tensor:
    """1 - mean of the Jensen-Shannon divergence of teacher and student (DeepInversion's adaptive term)."""
    p, q = (F.softmax(at_least_float32(logits) / temperature, dim=1) for logits in (teacher_logits, student_logits))
    log_middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny).log()
    log_p, log_q = (F.log_softmax(at_least_float32(logits) / temperature, dim=1)
                    for logits in (teacher_logits, student_logits))
    divergence = (p * (log_p - log_middle) + q * (log_q - log_middle)).sum(1) / 2
    return 1 - divergence.mean()


def information_entropy_loss(logits: Tensor) -> Tensor:
    """The negative entropy of the mean prediction, in nats: smallest, -log C, if all classes are equally frequent."""
    mean = F.softmax(at_least_float32(logits), dim=1).mean(0)
    return torch.special.xlogy(mean, mean).sum()


def activation_loss(features: Tensor) -> Tensor:
    """-mean of |features| (B, D) before the classifier: training images activate it, noise does not (DAFL)."""
    return -at_least_float32(features).abs().mean()


def total_variation(images: Tensor) -> Tensor:
    """The sum of the L2 norms of the differences between neighbours, in the four directions, of images (B, 3, H, W)."""
    return ((images[..., :, 1:] - images[..., :, :-1]).norm() + (images[..., 1:, :] - images[..., :-1, :]).norm()
            + (images[..., 1:, 1:] - images[..., :-1, :-1]).norm()
            + (images[..., 1:, :-1] - images[..., :-1, 1:]).norm())


def batch_norm_loss(captured: Captured) -> Tensor:
    """Distance between the statistics of a batch and the running ones of the batch norms whose inputs were captured:
    the sum over them of ||mean - running mean||_2 + ||variance - running variance||_2, variances divided by N.

    Yin et al., "Dreaming to Distill", CVPR 2020, arXiv:1912.08795, eq. 4, with norms that are not squared. ValueError
    if a captured module is no batch norm with running statistics.
    """
    terms = []
    for name, module, values in captured.calls:
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None or module.running_var is None:
            raise ValueError(f"{name} is no batch norm with running statistics")
        variance, mean = torch.var_mean(at_least_float32(values), dim=(0, 2, 3), correction=0)
        terms += [(mean - module.running_mean).norm(), (variance - module.running_var).norm()]
    return torch.stack(terms).sum()
