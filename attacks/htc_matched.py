"""High-temperature composition (HTC; Jandial et al., ECCV 2022), with teacher and student at the same temperature:

    loss = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

The authors published no code. This is the form of CMIM's benchmark (arXiv:2507.00012), CE + 0.9 T^2 KL, weighted as in
this package: with `alpha` 0.9 / 1.9, the default, the terms have the published ratio, and the published loss is 1.9
times this one. For large T, the KL term approaches the squared distance of the centered logits up to a constant factor.
`htc` is the other common form.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attacks import REGISTRY
from attacks.kd import KD


@REGISTRY.register("htc_matched", display_name="HTC (matched)", source="Jandial et al., ECCV 2022, as in CMIM, "
                                                                       "arXiv:2507.00012")
class MatchedHTC(KD):
    """Trains the student, at a high temperature, on answers softened by the same temperature, and on the labels with
    weight 1 - `alpha`."""

    class Params(KD.Params):
        published: ClassVar[dict[str, dict[str, float]]] = {"cifar100": {"temperature": 70.0}}
        temperature: float = Field(
            50.0, gt=0, description="temperature T of the softened outputs of teacher and student; 70 for CIFAR-100")
        alpha: float = Field(
            0.9 / 1.9, ge=0, le=1, description="weight of the KL term; the cross-entropy with the labels has 1 - "
                                               "`alpha`. The default is the published ratio of the terms, 0.9 to 1")

    params: Params
