"""Markov knowledge distillation (MKD; Yang & Ye, "Markov Knowledge Distillation: Make Nasty Teachers Trained by
Self-undermining Knowledge Distillation Fully Distillable", ECCV 2024).

    loss = alpha * T^2 * KL(t || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)
    t = q M_y,  q = softmax(answers / T),  M_y = softmax of each row of (s_y I + U_y V_y^T)

Each class y has a matrix of transition probabilities, trained with the student, that moves probability away from false
peaks. Student and matrices minimize the same KL term: one backward pass gives both gradients, because t does not depend
on the student, and the student's output does not depend on the matrices. They take their steps together, not in
alternation. A separate Adam trains the matrices, at a constant 1/100 of the student's initial learning rate.

U and V start uniform in (-1, 1). The initial s gives a matrix with U = V = 0 the value `diagonal` on its diagonal. With
s = 1, as in the only public code (by the authors of CMIM), the initial diagonal would be 0.03 for 100 classes, which
erases the teacher's answers. That code also normalizes columns, so t is no distribution, and softens t a second time,
so t is nearly uniform; this code does neither.
"""
from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, classes, weighted_terms
from utils.data import Batch
from utils.losses import at_least_float32, kl_from_log_probabilities
from utils.supervised import build_adam


@REGISTRY.register("mkd", display_name="MKD", source="Yang & Ye, ECCV 2024")
class MKD(Attack):
    """Trains the student on the answers times a transition matrix of the class, which is trained too, and on the labels
    with weight 1 - `alpha`. The class is the label or, for a thief without labels, the top class of the answer."""

    class Params(WeightedParams):
        reads_class = True
        published: ClassVar[dict[str, dict[str, float]]] = {"tiny_imagenet": {"rank": 5}}
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")
        rank: int = Field(
            3, ge=1, description="rank of the trained part U V^T of each transition matrix (one per class); 5 for "
                                 "Tiny-ImageNet")
        diagonal: float = Field(
            0.9, gt=0, lt=1, description="initial diagonal of the transition matrices: the fraction of its probability "
                                         "that each class keeps")

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        start = math.log(params.diagonal * max(num_classes - 1, 1) / (1 - params.diagonal))
        self.scale = nn.Parameter(torch.full((num_classes,), start))
        self.left, self.right = (nn.Parameter(torch.empty(num_classes, num_classes, params.rank).uniform_(-1, 1))
                                 for _ in range(2))

    def build_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return build_adam(self, learning_rate / 100)

    def log_matrices(self, labels: Tensor) -> Tensor:
        """Logarithms of the transition matrices (B, C, C) of the classes `labels` (B,): [b, i, j] is log P(i -> j)."""
        left, right = self.left[labels], self.right[labels]
        # elementwise products: autocast and TF32 would round a matrix product
        logits = sum((left[:, :, None, rank] * right[:, None, :, rank] for rank in range(self.params.rank)),
                     start=torch.diag_embed(self.scale[labels, None].expand(-1, self.num_classes)))
        return logits.log_softmax(2)

    def log_targets(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Logarithms of t, (B, C); finite even for answers that are exactly 0."""
        log_q = (at_least_float32(answers) / self.params.temperature).log_softmax(1)
        return (log_q[:, :, None] + self.log_matrices(labels)).logsumexp(1)

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits, temperature = student(batch.images), self.params.temperature
        log_p = (at_least_float32(logits) / temperature).log_softmax(1)
        kl = temperature**2 * kl_from_log_probabilities(self.log_targets(answers, classes(batch, answers)), log_p)
        return weighted_terms(logits, batch, alpha=self.params.alpha, kl=kl)
