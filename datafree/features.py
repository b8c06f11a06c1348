"""What a network computes inside, for a while: the inputs of its batch norms, and of its classifier."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.losses import at_least_float32


@dataclass
class Inside:
    """What the last forward passes went through, with its graph."""

    batch_norms: list[tuple[nn.BatchNorm2d, Tensor]] = field(default_factory=list)  # inputs (B, C, H, W), as executed
    penultimate: Tensor | None = None  # (B, D), the input of the last linear layer


@contextmanager
def inside(network: nn.Module) -> Iterator[Inside]:
    """Record what the network computes while the context lasts; nothing stays registered on it."""
    seen, handles = Inside(), []

    def of_batch_norm(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        seen.batch_norms.append((module, inputs[0]))

    def of_linear(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        seen.penultimate = inputs[0]

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(of_batch_norm))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(of_linear))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def batch_norm_loss(seen: Inside) -> Tensor:
    """How far the statistics of a batch are from those that the network remembers of its training data: the sum over
    its batch norms of ||mean - running mean||_2 + ||variance - running variance||_2, variances divided by N.

    Yin et al., "Dreaming to Distill", CVPR 2020, arXiv:1912.08795, eq. 4, with norms that are not squared.
    """
    terms = []
    for module, values in seen.batch_norms:
        variance, mean = torch.var_mean(at_least_float32(values), dim=(0, 2, 3), correction=0)
        terms += [(mean - module.running_mean).norm(), (variance - module.running_var).norm()]
    return torch.stack(terms).sum()


def instance_means(seen: Inside) -> Tensor:
    """The mean over positions of what enters each batch norm: (B, D), D all their channels together."""
    return torch.cat([at_least_float32(values).mean((2, 3)) for _, values in seen.batch_norms], dim=1)
