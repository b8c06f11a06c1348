"""Control of an attack: the answer is the mean of the answers of its class.

    loss = attack(student, batch, log(mean_y))
    mean_y = moving average of the probabilities of the answers of class y, decay 0.99 for each batch that holds it

For `kd` this is label smoothing with a distribution by class. What the teacher says about single images is lost.
"""
from __future__ import annotations

from torch import Tensor

from attacks import REGISTRY
from attacks.control import Control, ControlParams
from utils.losses import at_least_float32
from utils.means import ClassMeans


@REGISTRY.register("class_mean", display_name="Class-mean control", source="control; label smoothing by class")
class ClassMean(Control):
    """The attack `of` with the mean answer of each class: label smoothing by class."""

    class Params(ControlParams):
        reads_class = True

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.means = ClassMeans(num_classes)

    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        return self.means(at_least_float32(answers).softmax(1), labels).log()
