"""Conditional mutual information minimization (CMIM; Ye, Hamidi, Yang, TMLR 2025, arXiv:2507.00012).

    loss = CE(network(x), y) + weight * mean over tau of tau^2 * (1/B) sum_i KL(p_i^tau || Q_(y_i)^tau)
    p_i^tau = softmax(network(x_i) / tau)

Q_y^tau is the mean of p^tau over the images of class y: a moving average over the batches, including the current one,
without a gradient. The divergence estimates the mutual information of image and output given the label. If it is 0, all
images of a class have the same output, and a student learns no more from the outputs than from smoothed labels, at any
temperature.

The authors' public training file is empty; their weight and temperatures are unknown. This loss follows their
description and the same group's code for the opposite goal (MCMI). The factor tau^2 makes the terms comparable, since a
KL divergence falls with 1/tau^2. Weights to try: 0.1, 0.3, 1, 3, 10.
"""
from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from utils.data import Batch
from utils.losses import at_least_float32, cross_entropy, kl_from_log_probabilities
from utils.means import ClassMeans
from utils.params import MethodParams


@REGISTRY.register("cmim", display_name="CMIM",
                   source="Ye et al., TMLR 2025, arXiv:2507.00012 (loss reconstructed, weight and temperatures ours)")
class CMIM(Defense):
    """Trains the network on the labels, and to give similar outputs for all images of a class, at several
    temperatures."""

    class Params(MethodParams):
        strength: ClassVar[str] = "weight"
        weight: float = Field(1.0, ge=0, description="weight of the conditional mutual information term")
        temperatures: list[Annotated[float, Field(gt=0)]] = Field(
            [1.0, 2.0, 4.0, 8.0, 16.0], min_length=1,
            description="temperatures at which outputs are compared with the mean of their class; the term is averaged "
                        "over them")
        decay: float = Field(
            0.99, ge=0, lt=1, description="decay of each class's running mean of the outputs, which is updated by "
                                          "every batch that has the class; 0: mean over the batch")

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.means = ClassMeans(num_classes, params.decay, size=len(params.temperatures) * num_classes)

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = at_least_float32(network(batch.images))
        log_p = torch.stack([(logits / temperature).log_softmax(1) for temperature in self.params.temperatures], 1)
        means = self.means(log_p.exp().flatten(1), batch.labels).view_as(log_p)
        log_q = means.clamp(min=torch.finfo(means.dtype).tiny).log()  # a mean is 0 if all p of the class are
        kl = [temperature**2 * kl_from_log_probabilities(log_p[:, place], log_q[:, place])
              for place, temperature in enumerate(self.params.temperatures)]
        terms = {"cross_entropy": cross_entropy(logits, batch.labels), "cmi": torch.stack(kl).mean()}
        return {"loss": terms["cross_entropy"] + self.params.weight * terms["cmi"], **terms}
