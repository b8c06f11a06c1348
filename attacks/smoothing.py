"""Smoothing attack, as in ModelGuard (Tang et al., USENIX Security 2024): the mean answer over augmented views.

    answers = log of the mean over `num_views` views v of the interface's probabilities for v(x)
    loss    = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

Perturbations that differ between views average out. Each view is a query, so the thief pays `num_views` queries per
image. The loss is that of `kd`, by default at the published T 1 and without labels. Queries are averaged outside the
attack (`AttackParams.views`). 2-QPI, two queries per image, is `num_views` 2.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attacks import REGISTRY
from attacks.kd import KD


@REGISTRY.register("smoothing", display_name="Smoothing", source="Tang et al. (ModelGuard), USENIX Security 2024")
class Smoothing(KD):
    """Trains the student on the mean answer over several augmented views of an image, and on the labels with weight
    1 - `alpha`."""

    class Params(KD.Params):
        published: ClassVar[dict[str, dict[str, float]]] = {}
        alpha: float = Field(
            1.0, ge=0, le=1, description="weight of the KL term; the cross-entropy with the labels has 1 - `alpha`")
        temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs in the KL term")
        num_views: int = Field(
            3, ge=2, description="number of augmented views per image whose answers are averaged; each view is a query")

        @property
        def views(self) -> int:
            return self.num_views

    params: Params
