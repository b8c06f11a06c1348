"""DIST (Huang et al., NeurIPS 2022, arXiv:2205.10536): the student's outputs correlate with the answers.

    loss  = alpha * T^2 * (inter_weight * inter + intra_weight * intra) + (1 - alpha) * CE(student(x), y)
    inter = 1 - mean over images of the Pearson correlation of p_i and q_i, both rows (C,)
    intra = 1 - mean over classes of the Pearson correlation of p_c and q_c, both columns (B,)
    p = softmax(answers / T), q = softmax(student(x) / T)

The published loss, CE + beta T^2 inter + gamma T^2 intra, is twice this one with `alpha` 0.5. `intra` depends on the
batch size. The correlation of a constant row or column is undefined; it counts as 0, without a gradient.
"""
from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, weighted_terms
from utils.data import Batch
from utils.losses import at_least_float32


@REGISTRY.register("dist", display_name="DIST", source="Huang et al., NeurIPS 2022, arXiv:2205.10536")
class DIST(Attack):
    """Trains the student to correlate with the answers, within images and within classes, and on the labels with weight
    1 - `alpha`."""

    class Params(WeightedParams):
        alpha: float = Field(
            0.5, ge=0, le=1, description="weight of the correlation terms; the cross-entropy with the labels has 1 - "
                                         "`alpha`. 0.5 weighs both alike, as published")
        temperature: float = Field(1.0, gt=0, description="temperature T of the outputs that are correlated")
        inter_weight: float = Field(
            1.0, ge=0, description="weight of the inter-class term, the correlation over the classes of an image")
        intra_weight: float = Field(
            1.0, ge=0, description="weight of the intra-class term, the correlation over the batch for a class")

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        params, logits = self.params, student(batch.images)
        p, q = ((at_least_float32(each) / params.temperature).softmax(1) for each in (answers, logits))
        inter, intra = (params.temperature**2 * (1 - correlation(p, q, dim).mean()) for dim in (1, 0))
        term = params.inter_weight * inter + params.intra_weight * intra
        return {**weighted_terms(logits, batch, alpha=params.alpha, dist=term), "inter": inter, "intra": intra}


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson correlation of two tensors along a dimension; 0, without a gradient, where one of them is constant."""
    return (_unit(a, dim) * _unit(b, dim)).sum(dim)


def _unit(values: Tensor, dim: int) -> Tensor:
    """Values centered and scaled to norm 1; all 0 if they vary by no more than rounding."""
    centered = values - values.mean(dim, keepdim=True)
    square, rounding = (each.square().sum(dim, keepdim=True) for each in (centered, 1e-6 * values))
    return centered * square.masked_fill(square <= rounding + 1e-20, torch.inf).rsqrt()
