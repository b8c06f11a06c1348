"""Self-retrospection of ABD: Hong et al., "Revisiting Data-Free Knowledge Distillation with Poisoned Teachers",
ICML 2023, arXiv:2306.02368, with the implicit hypergradient of I-BAU: Zeng et al., "Adversarial Unlearning of
Backdoors via Implicit Hypergradient", ICLR 2022, arXiv:2110.03735.

    theta* = argmin_theta max_delta KL(S(x | theta) || S(x + delta | theta))

Each step finds one additive perturbation for all images, like a trigger, that changes the network's outputs most, and
then unlearns it. All divergences here are T^2 times the mean over the batch, as in distillation.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from utils.losses import kl_divergence

Objective = Callable[[Tensor], Tensor]  # maps delta to a scalar; reads the network's parameters in place


def hypergradient(inner: Objective, outer: Objective, delta: Tensor, parameters: Sequence[Tensor], *,
                  steps: int, eta: float) -> tuple[Tensor, ...]:
    """Gradient of outer(delta(theta), theta) by theta, where delta(theta) minimizes inner(., theta).

    Fixed-point iteration with the map Phi(delta) = delta - eta * d inner / d delta:

        v_0 = 0,   v_k+1 = (d Phi / d delta)^T v_k + d outer / d delta
        result = d outer / d theta + (d Phi / d theta)^T v_steps

    It converges if inner is convex around delta and eta is small; otherwise, a few steps give an approximation.

    Args:
        inner, outer: scalar functions of a tensor like `delta`; inner must be twice differentiable. Each is called
            once, inner first.
        delta: point at which to differentiate; not changed.
        parameters: theta, leaf tensors that require gradients.
        steps: number of iterations, at least 1.
        eta: step size of Phi.

    Returns:
        One tensor per parameter, zeros if neither function depends on it. `.grad` is not changed.
    """
    parameters = tuple(parameters)
    delta = delta.detach().clone().requires_grad_()
    inner_by_delta, = torch.autograd.grad(inner(delta), delta, create_graph=True)
    outer_by_delta, *outer_by_theta = torch.autograd.grad(outer(delta), (delta, *parameters), allow_unused=True,
                                                          materialize_grads=True)

    v = outer_by_delta  # v_1, since v_0 is zero
    for _ in range(steps - 1):
        product, = torch.autograd.grad(inner_by_delta, delta, v, retain_graph=True, materialize_grads=True)
        v = v - eta * product + outer_by_delta
    mixed = torch.autograd.grad(inner_by_delta, parameters, v, allow_unused=True, materialize_grads=True)
    return tuple(direct - eta * indirect for direct, indirect in zip(outer_by_theta, mixed, strict=True))


@dataclass(frozen=True)
class Retrospection:
    """Settings of a retrospection step, and the step.

    It runs in the precision of the images and needs second derivatives: call it outside autocast.
    """

    temperature: float  # of all divergences
    weight: float = 1.0  # of the hypergradient; the gradient of distillation has weight 1
    rounds: int = 10  # steps of Adam on delta
    learning_rate: float = 0.1  # of Adam on delta, in units of normalized images
    start: float = 0.01  # standard deviation of the initial delta; at 0 the gradient is only rounding
    penalty: float = 1e-3  # weight of the squared L2 norm of delta (lambda)
    radius: float | None = None  # of the L2 ball onto which delta is projected; None: no projection
    steps: int = 5  # of the fixed-point iteration of the hypergradient
    eta: float = 0.1  # step size of the fixed-point map
    portion: float = 0.02  # fraction of the batch that the outer objective perturbs, at least one image
    detach_clean: bool = True  # the outer objective moves S(x + delta) towards S(x), not both towards each other
    # `frozen`: all passes of retrospection use the running statistics and do not update them. `train`: the passes use
    # the network's current mode, so perturbed images enter the running statistics of a student; clean passes are
    # repeated to give them the share that they have in the published program, see `gradient`.
    batch_norm: Literal["frozen", "train"] = "frozen"

    def __post_init__(self) -> None:
        if self.batch_norm not in ("frozen", "train"):
            raise ValueError(f"batch_norm is 'frozen' or 'train', not {self.batch_norm!r}")

    def perturbation(self, model: nn.Module, images: Tensor,
                     random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Find the delta (1, C, H, W) that changes the outputs of `model` most: the inner maximization.

            delta = argmin - KL(M(x) || M(x + delta)) + penalty * ||delta||_2^2

        Args:
            model: maps images to logits; the teacher or the student. Its parameters and `.grad` are not changed.
            images: float (B, C, H, W), normalized, detached.
            random: CPU generator of the initial delta.

        Returns:
            delta (1, C, H, W), and two divergences, scalars: under the initial delta and under delta.
        """
        noise = torch.randn(1, *images.shape[1:], generator=random, dtype=images.dtype)
        delta = (self.start * noise).to(images.device).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=self.learning_rate)
        with self._mode(model):
            with torch.no_grad():
                clean = model(images)
            before = kl = self._kl(clean, model(images + delta))
            for _ in range(self.rounds):
                delta.grad, = torch.autograd.grad(self.penalty * delta.square().sum() - kl, delta)
                optimizer.step()
                if self.radius is not None:
                    with torch.no_grad():
                        delta.mul_((self.radius / delta.norm()).clamp(max=1))
                kl = self._kl(clean, model(images + delta))
        return delta.detach(), before.detach(), kl.detach()

    def gradient(self, student: nn.Module, images: Tensor, delta: Tensor, random: torch.Generator) -> list[Tensor]:
        """Hypergradient of the outer objective by each parameter of the student that requires a gradient.

        Inner: -KL(S(x) || S(x + delta)) + penalty * ||delta||_2^2, with S(x) detached. Outer: KL(S(x) || S(x')), where
        x' has delta added to a random portion of the images.

        With frozen batch norms, the student evaluates x, x + delta and x'. With `batch_norm` "train", the order of
        passes decides on the running statistics. It is that of the published ZSKT, for all methods: x, then x and
        x + delta, then x and x'. With the pass of distillation before them and a momentum of 0.1, x + delta has a share
        of 0.9^2 / (1 + 0.9 + ... + 0.9^5) = 17 % in the statistics after many steps. (If delta is found against the
        student instead of the teacher, the passes of that search enter the statistics too.)
        """
        chosen = torch.randperm(len(images), generator=random)[:max(1, int(self.portion * len(images)))]
        perturbed = torch.zeros(len(images), 1, 1, 1, dtype=images.dtype)
        perturbed[chosen] = 1
        perturbed = perturbed.to(images.device)
        parameters = _trained(student)
        with self._mode(student):
            with torch.set_grad_enabled(not self.detach_clean and self.batch_norm == "frozen"):
                logits = student(images)  # with "train", a pass for the running statistics only

            def clean(grad: bool) -> Tensor:
                if self.batch_norm == "train":
                    with torch.set_grad_enabled(grad):
                        return student(images)
                return logits if grad else logits.detach()

            def inner(delta: Tensor) -> Tensor:
                target = clean(grad=False)
                return self.penalty * delta.square().sum() - self._kl(target, student(images + delta))

            def outer(delta: Tensor) -> Tensor:
                target = clean(grad=not self.detach_clean)
                return self._kl(target, student(images + perturbed * delta))

            return list(hypergradient(inner, outer, delta, parameters, steps=self.steps, eta=self.eta))

    def accumulate(self, student: nn.Module, source: nn.Module, images: Tensor,
                   random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Add weight * hypergradient to the `.grad` of the student's parameters.

        Call it after `loss.backward()` of distillation and before `optimizer.step()`, outside autocast.

        Args:
            student: maps images to logits; its trainable parameters get the hypergradient.
            source: network against which delta is found, the teacher or the student. Not changed.
            images: float (B, C, H, W) of this step, normalized, detached.
            random: CPU generator of the initial delta and of the choice of perturbed images.

        Returns:
            delta (1, C, H, W), and scalars to log: `delta_norm` (L2), `kl_before` and `kl_after` (divergence of the
            source's outputs under the initial delta and under delta) and `hypergradient_norm` (L2, before weighting).
        """
        delta, kl_before, kl_after = self.perturbation(source, images, random)
        gradients = self.gradient(student, images, delta, random)
        for parameter, gradient in zip(_trained(student), gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = self.weight * gradient
            else:
                parameter.grad.add_(gradient, alpha=self.weight)
        return delta, {"delta_norm": delta.norm(), "kl_before": kl_before, "kl_after": kl_after,
                       "hypergradient_norm": torch.stack([gradient.norm() for gradient in gradients]).norm()}

    def _kl(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        return self.temperature**2 * kl_divergence(p_logits, q_logits, temperature=self.temperature)

    @contextmanager
    def _mode(self, model: nn.Module) -> Iterator[None]:
        """Set the network to eval mode if `batch_norm` is frozen, and restore its modes afterwards."""
        modes = {module: module.training for module in model.modules()}
        try:
            if self.batch_norm == "frozen":
                model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
