"""Nasty teacher: self-undermining knowledge distillation (Ma et al., ICLR 2021, arXiv:2105.07381, eq. 2).

    loss = CE(nasty(x), y) - weight * T^2 * KL(softmax(nasty(x) / T) || softmax(adversary(x) / T))

The adversary is a normally trained teacher, frozen. Moving the softened outputs away from the adversary's keeps the
true class on top and gives false peaks to the others, which are what a student learns from.
"""
from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from utils.data import Batch
from utils.evaluation import Frozen
from utils.losses import nasty_terms
from utils.params import MethodParams, ModelOptions


@REGISTRY.register("nasty", display_name="nasty", source="Ma et al., ICLR 2021, arXiv:2105.07381")
class Nasty(Defense):
    """Accurate on the labels, far from the adversary in its softened outputs."""

    class Params(MethodParams):
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")
        weight: float = Field(
            0.04, ge=0, description="weight of the KL term that drives the nasty teacher away from the adversary")
        adversarial_model: str = Field(
            description="architecture of the frozen adversary, usually the same as `model_name`")
        adversarial_num_channels: int = Field(
            32, ge=1, description="width of the adversary's first layer if the adversary is a `net`")
        adversarial_model_options: ModelOptions = Field(
            {}, description="keyword arguments for the adversary's constructor if it is not a network of the zoo")
        adversarial_resume: str = Field(description="checkpoint of the adversary, a normally trained teacher")

        def without_effect(self) -> Iterator[tuple[str, str]]:
            yield from super().without_effect()
            if self.adversarial_model != "net":
                yield "adversarial_num_channels", '"adversarial_model" is not "net"'

    params: Params
    frozen_roles = ("adversarial",)

    def __init__(self, params: Params, num_classes: int, *, adversarial: Frozen) -> None:
        super().__init__(params, num_classes)
        self.adversary = adversarial

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return nasty_terms(network(batch.images), self.adversary(batch), batch.labels,
                           temperature=self.params.temperature, weight=self.params.weight)
