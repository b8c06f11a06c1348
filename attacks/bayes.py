"""Partial Bayes recovery (Tang et al., ModelGuard, USENIX Security 2024), with a table of clean and perturbed answers.

The estimate of a clean answer is the mean of the table's clean answers whose perturbed forms have the same top class as
the observed answer and lie within L1 distance 0.01 of it. If there are none, it
is the clean answer of the nearest perturbed form.
"""
from __future__ import annotations

import torch
from torch import Tensor

from attacks import REGISTRY
from attacks.recovering import Recovering

TOLERANCE = 0.01  # L1 distance
ROWS = 512  # observed answers per distance matrix


@REGISTRY.register("bayes", display_name="Bayes", source="Tang et al. (ModelGuard), USENIX Security 2024")
class Bayes(Recovering):
    """Undoes a known answer defense by a table of clean and perturbed answers, and trains the student on the estimated
    clean answers."""

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
