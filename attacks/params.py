"""Parameters that attacks share, and what they say about labels and queries. Imports no torch, as params.json files are
read without it."""
from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from utils.params import MethodParams


class AttackParams(MethodParams):
    """Parameters of an attack, which also say what it does with labels."""

    reads_class: ClassVar[bool] = False  # of each image: its label or, without labels, the top class of its answer

    @property
    def reads_labels(self) -> bool:
        """Whether the loss depends on the true labels if the thief has them."""
        return self.reads_class

    @property
    def needs_labels(self) -> str:
        """Why the attack cannot do without labels; empty if it can."""
        return ""

    @property
    def reads_top_class(self) -> bool:
        """Whether the loss picks the top class of an answer, of which a uniform answer has none."""
        return False

    @property
    def top_class_only(self) -> bool:
        """Whether the student learns from the top class of each answer and from nothing else."""
        return False

    @property
    def needs_all_answers(self) -> bool:
        """Whether the attack studies the answers to all images before the first epoch."""
        return False

    @property
    def control_of(self) -> str:
        """The attack whose answers a control replaces; empty for an attack proper."""
        return ""

    @property
    def settings_of(self) -> dict[str, Any]:
        """The parameters of that attack."""
        return {}

    @property
    def views(self) -> int:
        """Number of augmented views of an image whose answers are averaged, each of which is a query."""
        return 1


class WeightedParams(AttackParams):
    """Parameters of a loss `alpha` * (teacher's term) + (1 - `alpha`) * CE(labels)."""

    alpha: float = Field(
        0.9, ge=0, le=1, description="weight of the teacher term; the cross-entropy with the labels has 1 - `alpha`")

    @property
    def reads_labels(self) -> bool:
        return self.reads_class or self.alpha < 1

    @property
    def needs_labels(self) -> str:
        return f'"alpha" is {self.alpha:g}, which weighs labels by {1 - self.alpha:g}: set it to 1' * (self.alpha < 1)
