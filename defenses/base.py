"""Base class of trained-in defenses."""
from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from utils.data import Batch
from utils.method import Method


class Defense(Method):
    """Loss that trains a network from whose answers students learn little.

    `frozen_roles` names the frozen networks that the defense needs. For each, `Params` have `ROLE_model`,
    `ROLE_num_channels`, `ROLE_model_options` and `ROLE_resume`, and the constructor gets the network as the keyword
    ROLE. Trained parameters of a defense: see `utils.method.Method`.
    """

    frozen_roles: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss of one batch and its terms by name, scalars that are logged: `{"loss": ..., name: ...}`.

        Args:
            network: network in training mode; maps images to logits (B, C).
            batch: images float32 (B, 3, H, W), labels int64 (B,), index int64 (B,), epoch float32 ().
        """
