"""The contract of a trained-in defense."""
from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from utils.data import Batch
from utils.method import Method


class Defense(Method):
    """A loss that trains a network whose answers teach little.

    `frozen_roles` names the frozen networks that the defense needs; its `Params` have `ROLE_model`,
    `ROLE_num_channels`, `ROLE_model_options` and `ROLE_resume` for each, and the constructor gets each as the keyword
    ROLE. See `utils.method.Method` for parameters of its own.
    """

    frozen_roles: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss of one batch and its named terms, each a scalar that is logged: `{"loss": ..., name: ...}`.

        Args:
            network: network in training mode; maps images to logits (B, C).
            batch: images float32 (B, 3, H, W), labels int64 (B,), index int64 (B,), epoch float32 ().
        """
