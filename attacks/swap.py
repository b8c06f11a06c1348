"""Swapped logits: distillation of answers that are corrected by the labels.

    loss = alpha * T^2 * KL(softmax(swapped / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

`swapped` are the answers, with the logits of top class and label exchanged if the two differ. Of Swapped Logit
Distillation (SLD, 2025), this is only the correction of the teacher. The defaults are those of `kd`.
"""
from __future__ import annotations

from torch import Tensor, nn

from attacks import REGISTRY
from attacks.kd import KD
from utils.data import Batch


@REGISTRY.register("swap", display_name="Swap", source="the teacher's swap of Swapped Logit Distillation (SLD), 2025")
class Swap(KD):
    """Exchanges the logits of top class and label where they differ, and then trains as `kd`."""

    class Params(KD.Params):
        reads_class = True

        @property
        def needs_labels(self) -> str:
            return "labels correct the wrong answers of the teacher"

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        if batch.labels is None:
            raise ValueError(f"no labels: {self.params.needs_labels}")
        return super().forward(student, batch, swap_top(answers, batch.labels))


def swap_top(answers: Tensor, labels: Tensor) -> Tensor:
    """Answers (B, C) with the entries of the top class and of the label (B,) exchanged."""
    top, true = answers.argmax(1, keepdim=True), labels[:, None]
    return answers.scatter(1, top, answers.gather(1, true)).scatter(1, true, answers.gather(1, top))
