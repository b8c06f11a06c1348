"""The contract of an attack, and what attacks share."""
from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from utils.data import Batch
from utils.losses import cross_entropy
from utils.method import Method
from utils.params import MethodParams


class AttackParams(MethodParams):
    """Parameters of an attack, which also say what it does with labels."""

    @property
    def reads_labels(self) -> bool:
        """Whether the loss depends on the true labels if the thief has them."""
        return False

    @property
    def needs_labels(self) -> str:
        """Why the attack cannot do without labels; empty if it can."""
        return ""

    @property
    def views(self) -> int:
        """Number of augmented views of an image whose answers are averaged, each of which is a query."""
        return 1

    @property
    def control_of(self) -> str:
        """Name of the attack that this one repeats with answers that tell no image from another of its class, see
        `attacks.control`; empty for an attack."""
        return ""


class WeightedParams(AttackParams):
    """Parameters of a loss `alpha` * (teacher's term) + (1 - `alpha`) * CE(labels)."""

    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher's term; the cross-entropy has 1 - `alpha`")

    @property
    def reads_labels(self) -> bool:
        return self.alpha < 1

    @property
    def needs_labels(self) -> str:
        return f'"alpha" is {self.alpha:g}, which weighs labels by {1 - self.alpha:g}: set it to 1' * (self.alpha < 1)


class Attack(Method):
    """A loss that trains a student on a teacher's answers. See `utils.method.Method` for parameters of its own.

    A subclass gives `Params`, which declare the attack's use of labels.
    """

    Params: ClassVar[type[AttackParams]] = AttackParams

    @abstractmethod
    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        """Loss of one batch and its named terms, each a scalar that is logged: `{"loss": ..., name: ...}`.

        Args:
            student: network in training mode; maps images to logits (B, C).
            batch: images float32 (B, 3, H, W), labels int64 (B,) or None for a thief without labels, index int64 (B,),
                epoch float32 ().
            answers: float32 or bfloat16 (B, C), log-probabilities up to a constant per row (logits, for instance);
                -inf where the interface returned exactly 0.
        """


def classes(batch: Batch, answers: Tensor) -> Tensor:
    """The class of each image, int64 (B,): its label, or, for a thief without labels, the top class of its answer, the
    first one in a tie."""
    return answers.argmax(1) if batch.labels is None else batch.labels


def weighted_terms(logits: Tensor, batch: Batch, *, alpha: float, **term: Tensor) -> dict[str, Tensor]:
    """The terms of `alpha` * term + (1 - `alpha`) * CE(logits, labels), for one term, given by its name.

    Without labels the cross-entropy is left out; `alpha` is 1 then (`AttackParams.needs_labels`).
    """
    (value,) = term.values()
    if batch.labels is None:
        return {"loss": alpha * value, **term}
    ce = cross_entropy(logits, batch.labels)
    return {"loss": alpha * value + (1 - alpha) * ce, **term, "cross_entropy": ce}
