"""Adversarial sparse teacher (AST; Yilmaz & Keles, 2024).

    loss = (1 - alpha) * CE(network(x), y) + alpha * T^2 * E(softmax(network(x) / T), q)
    q = softmax of the `top_k` largest logits of network(x') / T, 0 elsewhere
    E(p, q) = (1/B) sum_i sum_c exp(q_c) * (q_c - p_c)

x' is an adversarial example of x: projected gradient ascent (PGD) on the cross-entropy, in eval mode, starting at x.
So the network learns a few false peaks, its own mistakes. q has no gradient. E, the paper's exponential predictive
divergence, is linear in p and is not a divergence: E(q, q) is 0, but E of a one-hot p is -0.13 at q = (0.6, 0.4). It
rewards p on the peaks of q.

Here, the attack changes pixels in [0, 1] by at most `epsilon`, and makes a new x' for each augmented image with the
current network. In the published code (codeofanon/AdversarialSparseTeacher), the attack clamps normalized images to
[0, 1], which removes every pixel below the mean; x' is made once and stored; and q belongs to another image than p. So
published numbers do not apply to this loss. The published attack has epsilon 0.3, step_size 0.01 and num_steps 40;
ResNet-50 on CIFAR-100 has alpha 0.03. Each step of the attack costs about as much as a training step.
"""
from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from utils.data import Batch
from utils.errors import UserError
from utils.losses import at_least_float32, cross_entropy
from utils.params import MethodParams
from utils.step import eval_mode


@REGISTRY.register("ast", display_name="AST", source="Yilmaz & Keles, 2024 (pairs aligned, attack in pixel space)")
class AST(Defense):
    """Trains the network on the labels, and on its own `top_k` largest outputs for adversarial examples."""

    class Params(MethodParams):
        strength: ClassVar[str] = "alpha"
        published: ClassVar[dict[str, dict[str, float]]] = {
            "cifar100": {"alpha": 0.035, "temperature": 30.0, "top_k": 7}}
        alpha: float = Field(
            0.05, ge=0, le=1, description="weight of the divergence from the sparse outputs; the cross-entropy has "
                                          "1 - `alpha`; 0.035 for CIFAR-100")
        temperature: float = Field(
            6.0, gt=0, description="temperature T of the softened outputs in the divergence; 30 for CIFAR-100")
        top_k: int = Field(
            2, ge=1, description="number of top logits of an adversarial example that are kept; 7 for CIFAR-100")
        epsilon: float = Field(
            8 / 255, ge=0, le=1,
            description="maximum change of a pixel, for pixels in [0, 1], in an adversarial example")
        step_size: float = Field(
            2 / 255, gt=0, description="step size of the attack that makes adversarial examples, for pixels in [0, 1]")
        num_steps: int = Field(5, ge=0, description="number of steps of the attack that makes adversarial examples")

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        if params.top_k > num_classes:
            raise UserError(f'"top_k" is {params.top_k}, but there are {num_classes} classes')

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        params = self.params
        # The pass with gradients comes first: autocast caches the weights that it casts, without gradients if the first
        # pass has none.
        logits = network(batch.images)
        with eval_mode(network) as attacked:
            adversarial = self.attack(attacked, batch)
            with torch.no_grad():
                target = self.sparse(attacked(adversarial))
        p = (at_least_float32(logits) / params.temperature).softmax(1)
        terms = {"cross_entropy": cross_entropy(logits, batch.labels),
                 "divergence": params.temperature**2 * exponential_divergence(p, target)}
        loss = (1 - params.alpha) * terms["cross_entropy"] + params.alpha * terms["divergence"]
        return {"loss": loss, **terms}

    def attack(self, network: nn.Module, batch: Batch) -> Tensor:
        """Adversarial examples (B, 3, H, W), normalized like the images. network: in eval mode."""
        params, images = self.params, batch.images
        if self.normalization is None:
            mean, std = torch.zeros(3, 1, 1, device=images.device), torch.ones(3, 1, 1, device=images.device)
        else:
            mean, std = (values.view(3, 1, 1) for values in self.normalization)
        lower = torch.maximum(images - params.epsilon / std, -mean / std)
        upper = torch.minimum(images + params.epsilon / std, (1 - mean) / std)
        adversarial = images.detach()
        for _ in range(params.num_steps):
            adversarial.requires_grad_()
            loss = cross_entropy(network(adversarial), batch.labels)
            gradient, = torch.autograd.grad(loss, adversarial)
            step = params.step_size / std * gradient.sign()
            adversarial = (adversarial.detach() + step).clamp(lower, upper)
        return adversarial.detach()

    def sparse(self, logits: Tensor) -> Tensor:
        """Softmax over the `top_k` largest logits at temperature T, float32 (B, C); 0 elsewhere."""
        logits = at_least_float32(logits)
        values, places = logits.topk(self.params.top_k, dim=1)
        return torch.zeros_like(logits).scatter(1, places, (values / self.params.temperature).softmax(1))


def exponential_divergence(p: Tensor, q: Tensor) -> Tensor:
    """E(p, q) of probabilities (B, C): the sum over classes of exp(q) * (q - p), mean over the batch."""
    return (q.exp() * (q - p)).sum(1).mean()
