"""Label smoothing (Szegedy et al., CVPR 2016), a control for trained-in defenses.

    loss = CE(network(x), (1 - epsilon) * one_hot(y) + epsilon / C)

Like some defenses, label smoothing pulls the outputs of a class together, but it is not meant as a defense. Compare
defenses with it. The loss is that of train_scratch.py with `label_smoothing`.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from utils.data import Batch
from utils.losses import cross_entropy
from utils.params import MethodParams


@REGISTRY.register("label_smoothing", display_name="label smoothing", source="Szegedy et al., CVPR 2016 (a control)")
class LabelSmoothing(Defense):
    """Trains the network on smoothed labels: a control."""

    class Params(MethodParams):
        strength: ClassVar[str] = "epsilon"
        epsilon: float = Field(
            0.1, ge=0, lt=1, description="probability of the target that is spread evenly over all classes")

    params: Params

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": cross_entropy(network(batch.images), batch.labels, label_smoothing=self.params.epsilon)}
