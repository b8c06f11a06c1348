"""Partial Bayes recovery (Tang et al., ModelGuard, USENIX Security 2024): a table of clean and perturbed answers.

The clean answer to an observed one is estimated by the mean of the clean answers in the table whose perturbed forms
have the same top class and lie within L1 distance 0.01 of it; by that of the nearest where there is none.
"""
from __future__ import annotations

import torch
from torch import Tensor

from attacks import REGISTRY
from attacks.recovering import Recovering

TOLERANCE = 0.01  # L1 distance
ROWS = 512  # observed answers that are compared at a time


@REGISTRY.register("bayes", display_name="Bayes", source="Tang et al. (ModelGuard), USENIX Security 2024")
class Bayes(Recovering):
    """Student of the answers that a table of the known answer defense recovers."""

    def recover(self, observed: Tensor, clean: Tensor, perturbed: Tensor) -> Tensor:
        recovered = observed.clone()
        for label in range(observed.shape[1]):
            of_table = perturbed.argmax(1) == label
            if not of_table.any():
                continue
            for rows in (observed.argmax(1) == label).nonzero().flatten().split(ROWS):
                distance = torch.cdist(observed[rows], perturbed[of_table], p=1)
                near = (distance <= TOLERANCE).to(clean.dtype)
                nearest = clean[of_table][distance.argmin(1)]
                count = near.sum(1, keepdim=True)
                recovered[rows] = torch.where(count > 0, near @ clean[of_table] / count.clamp(min=1), nearest)
        return recovered
