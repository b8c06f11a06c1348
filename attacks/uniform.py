"""Control of an attack: each answer is replaced by the uniform distribution over the classes.

    loss = attack(student, batch, 0)

For `kd` this is label smoothing. If the control's student is as good as the attack's, the attack took nothing from the
teacher.
"""
from __future__ import annotations

import torch
from torch import Tensor

from attacks import REGISTRY
from attacks.control import Control, ControlParams


@REGISTRY.register("uniform", display_name="Uniform control", source="control; label smoothing")
class Uniform(Control):
    """Runs another attack (the parameter `of`) on uniform answers: label smoothing."""

    class Params(ControlParams):
        keeps_top_class = False

    params: Params

    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros_like(answers)
