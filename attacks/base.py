"""The contract of an attack."""
from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from utils.data import Batch
from utils.method import Method


class Attack(Method):
    """A loss that trains a student on a teacher's answers. See `utils.method.Method` for parameters of its own."""

    @abstractmethod
    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        """Loss of one batch and its named terms, each a scalar that is logged: `{"loss": ..., name: ...}`.

        Args:
            student: network in training mode; maps images to logits (B, C).
            batch: images float32 (B, 3, H, W), labels int64 (B,), index int64 (B,), epoch float32 ().
            answers: float32 or bfloat16 (B, C), log-probabilities up to a constant per row (logits, for instance);
                -inf where the interface returned exactly 0.
        """
