"""Nasty teacher: self-undermining knowledge distillation (Ma et al., ICLR 2021, arXiv:2105.07381, eq. 2).

    loss = CE(nasty(x), y) - weight * T^2 * KL(softmax(nasty(x) / T) || softmax(adversary(x) / T))

The adversary is a normally trained teacher, frozen. The KL term moves the softened outputs away from the adversary's:
the true class stays on top, and other classes get false peaks, which mislead students.

"Just Mildly Nasty" (github.com/mattkelleher/Nasty-Teacher) has two fast forms, for a network that starts from trained
weights (`init_from`):
- *light*, `trained_layers` "classifier": only the layer that computes the logits is trained. All others are frozen and
  in eval mode, so their running statistics stay too. A step has no backward pass through them.
- *half*, `kl_layers` "classifier": the gradient of the KL term reaches only the classifier, the gradient of the
  cross-entropy all layers. So the features stay those of an ordinary network.
Both forms work with any network whose logits come from a linear layer or a convolution. For a network that starts from
the adversary's weights, the KL term and its gradient are 0 at first; the cross-entropy moves it away.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from model.features import classifier
from utils.data import Batch
from utils.errors import UserError
from utils.evaluation import Frozen
from utils.losses import nasty_terms
from utils.params import MethodParams, ModelOptions
from utils.step import eval_mode, unwrapped


@REGISTRY.register("nasty", display_name="nasty", source="Ma et al., ICLR 2021, arXiv:2105.07381")
class Nasty(Defense):
    """Trains the network on the labels, and away from the softened outputs of a frozen adversary."""

    class Params(MethodParams):
        strength: ClassVar[str] = "weight"
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")
        weight: float = Field(
            0.04, ge=0, description="weight of the KL term that moves the nasty teacher away from the adversary")
        adversarial_model: str = Field(
            description="architecture of the frozen adversary, usually the same as `model_name`")
        adversarial_num_channels: int = Field(
            32, ge=1, description="width of the first layer if `adversarial_model` is `net`")
        adversarial_model_options: ModelOptions = Field(
            {}, description="constructor arguments of an adversary that is not in the zoo")
        adversarial_resume: str = Field(description="checkpoint of the adversary, a normally trained teacher")
        trained_layers: Literal["all", "classifier"] = Field(
            "all", description="layers that are trained. `classifier`: only the layer that computes the logits; start "
                               "from trained weights then (`init_from`)")
        kl_layers: Literal["all", "classifier"] = Field(
            "all", description="layers that get the gradient of the KL term. `classifier`: only the layer that "
                               "computes the logits")

        def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
            yield from super().ineffective_parameters()
            if self.adversarial_model != "net":
                yield "adversarial_num_channels", '"adversarial_model" is not "net"'
            if self.trained_layers == "classifier":
                yield "kl_layers", '"trained_layers" is "classifier"'

    params: Params
    frozen_roles = ("adversarial",)

    def __init__(self, params: Params, num_classes: int, *, adversarial: Frozen) -> None:
        super().__init__(params, num_classes)
        self.adversary = adversarial
        self.place = ""  # name of the classifier, if one of the fast forms needs it

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        if self.place or self.params.trained_layers == self.params.kl_layers == "all":
            return
        place = classifier(network, images.shape[-1])
        if place is None:
            key = "trained_layers" if self.params.trained_layers == "classifier" else "kl_layers"
            raise UserError(f'"{key}" is "classifier": the network must compute its logits by a linear layer or a '
                            'convolution; set it to "all"')
        self.place = place
        if self.params.trained_layers == "classifier":
            network.requires_grad_(False).get_submodule(place).requires_grad_(True)

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.prepare(unwrapped(network), batch.images)
        params, light = self.params, self.params.trained_layers == "classifier"
        mode: AbstractContextManager[Any] = eval_mode(network) if light else nullcontext()
        with mode:
            logits = network(batch.images)
        terms = nasty_terms(logits, self.adversary(batch), batch.labels, temperature=params.temperature,
                            weight=params.weight)
        if params.kl_layers == "classifier" and not light:
            layer = unwrapped(network).get_submodule(self.place)
            reaching = with_gradient_of(terms["kl"], list(layer.parameters()))
            terms["loss"] = terms["cross_entropy"] - params.weight * reaching
        return terms


def with_gradient_of(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a scalar with its value, and with its gradient by these parameters only."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    zeros = [((each - each.detach()) * gradient).sum() for each, gradient in zip(parameters, gradients, strict=True)]
    return value.detach() + torch.stack(zeros).sum()
