"""Adversarial images, which make clean-label poisoning (Turner et al., 2019, arXiv:1912.02771) work: an image that no
longer looks like its class to a network leaves the trigger as the easier thing to learn."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.augment import normalize
from utils.losses import cross_entropy


def pgd(network: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, epsilon: int = 16,
        step_size: int = 2, steps: int = 20, batch_size: int = 256) -> Tensor:
    """Projected gradient ascent (Madry et al., 2018, arXiv:1706.06083) on the cross-entropy of the true labels within
    an l_inf ball: untargeted, from the image itself, in whole grey values, so that nothing is rounded away.

    Args:
        network: maps normalised images to logits. Attacked in evaluation mode; its modes, parameters, gradients and
            running statistics are afterwards as they were.
        images: uint8 (B, H, W, C).
        labels: int64 (B,), the true classes.
        mean, std: float32 (C,), of pixels in [0, 1]: those that the network was trained with.
        epsilon, step_size: in grey values of 255.

    Returns:
        uint8 (B, H, W, C), nowhere further than epsilon from the images.
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
            # The gradient by the normalised input has the sign of the one by the pixels, and that is all that counts.
            inputs = normalize(attacked.byte(), mean, std).requires_grad_()
            gradient, = torch.autograd.grad(cross_entropy(network(inputs), labels), inputs)
        step = step_size * gradient.permute(0, 2, 3, 1).sign().short()
        attacked = (attacked + step).clamp_(lowest, highest)
    return attacked.byte()
