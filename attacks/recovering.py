"""Adaptive attacks: a thief who knows the answer defense undoes it before the student is trained.

The thief has a copy of the answer defense and of the interface, but not of the model. It draws clean answers u from
Dirichlet distributions with concentration 8 C p around observed answers p of C classes, perturbs them to u' with the
defense, and learns from the pairs to recover u from u' (Tang et al., ModelGuard, USENIX Security 2024). Without a
defense, the attack is plain distillation of the answers.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks.kd import KD
from utils.data import Batch

CONCENTRATION = 8.0  # times the number of classes


class Recovering(KD):
    """Base class of attacks that train the student on recovered answers."""

    class Params(KD.Params):
        published: ClassVar[dict[str, dict[str, float]]] = {}
        alpha: float = Field(
            1.0, ge=0, le=1, description="weight of the KL term; the cross-entropy with the labels has 1 - `alpha`")
        temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs in the KL term")
        pairs: int = Field(
            100_000, ge=1000, description="number of pairs of clean and perturbed answers that the recovery is fitted "
                                          "on; published: 1,000,000")

        @property
        def needs_all_answers(self) -> bool:
            return True

    params: Params
    recovered: Tensor | None = None  # log-probabilities (N, C) of all training images

    def learn_defense(self, defend: Callable[[Tensor], Tensor], answers: Tensor) -> str:
        with torch.random.fork_rng([answers.device] if answers.is_cuda else []):
            torch.manual_seed(self.seed)
            observed = answers.softmax(1)
            clean = draw_answers(observed, self.params.pairs)
            recovered = self.recover(observed, clean, defend(clean.log()).exp()).clamp(min=0)
        self.recovered = recovered.log()
        distance = (defend(self.recovered).exp() - observed).abs().sum(1).mean().item()
        kept = (recovered.argmax(1) == observed.argmax(1)).float().mean().item()
        return (f"recovered answers: {100 * kept:.2f} % keep the top class of the observed answers; perturbed again, "
                f"their mean L1 distance to the observed answers is {distance:.3f}")

    @abstractmethod
    def recover(self, observed: Tensor, clean: Tensor, perturbed: Tensor) -> Tensor:
        """Estimate clean answers, probabilities (N, C).

        Args:
            observed: probabilities (N, C), the perturbed answers to all training images.
            clean, perturbed: probabilities (P, C), pairs to learn from.
        """

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        return super().forward(student, batch, answers if self.recovered is None else batch.look_up(self.recovered))


def draw_answers(observed: Tensor, count: int) -> Tensor:
    """Draw probabilities (count, C) from Dirichlet distributions around `count` of the observed answers (N, C)."""
    around = observed[torch.randint(len(observed), (count,), device=observed.device)]
    concentration = (CONCENTRATION * observed.shape[1] * around).clamp(min=1e-3)
    return torch.distributions.Dirichlet(concentration).sample().clamp(min=1e-12)
