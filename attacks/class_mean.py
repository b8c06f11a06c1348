"""Control of an attack: each answer is replaced by the mean answer of its class.

    loss = attack(student, batch, log(mean_y))
    mean_y = moving average of the answers of class y (probabilities), decay 0.99 per batch that contains the class

For `kd` this is label smoothing with one distribution per class. It removes the teacher's information about single
images.
"""
from __future__ import annotations

from torch import Tensor

from attacks import REGISTRY
from attacks.control import Control, ControlParams
from utils.losses import at_least_float32
from utils.means import ClassMeans


@REGISTRY.register("class_mean", display_name="Class-mean control", source="control; label smoothing by class")
class ClassMean(Control):
    """Runs another attack (the parameter `of`) on the mean answer of each class: label smoothing by class."""

    class Params(ControlParams):
        reads_class = True

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.means = ClassMeans(num_classes)

    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        return self.means(at_least_float32(answers).softmax(1), labels).log()
