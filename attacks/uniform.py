"""Control of an attack: the answer is uniform over the classes.

    loss = attack(student, batch, 0)

For `kd` this is label smoothing. A student that it trains as well as the attack does learned nothing from the teacher.
"""
from __future__ import annotations

import torch
from torch import Tensor

from attacks import REGISTRY
from attacks.control import Control, ControlParams


@REGISTRY.register("uniform", display_name="Uniform control", source="control; label smoothing")
class Uniform(Control):
    """The attack `of` with uniform answers: label smoothing."""

    class Params(ControlParams):
        keeps_top_class = False

    params: Params

    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros_like(answers)
