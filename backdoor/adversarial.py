"""Adversarial images for clean-label poisoning (Turner et al., 2019, arXiv:1912.02771): since they no longer look like
their class to a network, the trigger is easier to learn."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.augment import normalize
from utils.losses import cross_entropy


def pgd(network: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, epsilon: int = 16,
        step_size: int = 2, steps: int = 20, batch_size: int = 256) -> Tensor:
    """Projected gradient ascent (PGD; Madry et al., 2018, arXiv:1706.06083) on the cross-entropy of the true labels,
    within an l_inf ball, starting at the image. Steps are integer gray values, so nothing is lost by rounding.

    Args:
        network: maps normalized images to logits. Attacked in eval mode; its modes, parameters, gradients and running
            statistics are unchanged afterwards.
        images: uint8 (B, H, W, C).
        labels: int64 (B,), the true classes.
        mean, std: float32 (C,), normalization of the network, for pixels in [0, 1].
        epsilon, step_size: radius of the ball and size of a step, in gray values (0 to 255).

    Returns:
        uint8 (B, H, W, C), at most epsilon from the images in each value.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return torch.cat([_attack(network, *part, mean, std, epsilon, step_size, steps) for part in parts])
    finally:
        for module, training in modes:
            module.training = training


def _attack(network: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, epsilon: int,
            step_size: int, steps: int) -> Tensor:
    originals = images.short()
    lowest, highest = (originals - epsilon).clamp_(min=0), (originals + epsilon).clamp_(max=255)
    attacked = originals
    for _ in range(steps):
        with torch.enable_grad():
            # Normalization does not change the sign of the gradient.
            inputs = normalize(attacked.byte(), mean, std).requires_grad_()
            gradient, = torch.autograd.grad(cross_entropy(network(inputs), labels), inputs)
        step = step_size * gradient.permute(0, 2, 3, 1).sign().short()
        attacked = (attacked + step).clamp_(lowest, highest)
    return attacked.byte()
