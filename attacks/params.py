"""Parameters that attacks share, and their use of labels and queries. Imports no torch, because params.json files are
read without it."""
from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from utils.params import MethodParams


class AttackParams(MethodParams):
    """Parameters of an attack, and its use of labels and queries."""

    reads_class: ClassVar[bool] = False  # whether the loss uses `attacks.base.classes`

    @property
    def reads_labels(self) -> bool:
        """True if the loss depends on the true labels of a thief who has them."""
        return self.reads_class

    @property
    def needs_labels(self) -> str:
        """Reason why the attack needs labels; empty if it does not."""
        return ""

    @property
    def reads_top_class(self) -> bool:
        """True if the loss uses the top class of an answer. A uniform answer has none."""
        return False

    @property
    def top_class_only(self) -> bool:
        """True if the student learns only from the top class of each answer."""
        return False

    @property
    def needs_all_answers(self) -> bool:
        """True if the attack needs the answers to all images before the first epoch (`Attack.learn_defense`)."""
        return False

    @property
    def control_of(self) -> str:
        """Name of the attack that a control repeats; empty if this is not a control."""
        return ""

    @property
    def settings_of(self) -> dict[str, Any]:
        """Parameters of the attack that a control repeats."""
        return {}

    @property
    def views(self) -> int:
        """Number of augmented views per image whose answers are averaged. Each view is a query."""
        return 1


class WeightedParams(AttackParams):
    """Parameters of the loss `alpha` * (teacher's term) + (1 - `alpha`) * CE(labels)."""

    alpha: float = Field(
        0.9, ge=0, le=1, description="weight of the teacher term; the cross-entropy with the labels has 1 - `alpha`")

    @property
    def reads_labels(self) -> bool:
        return self.reads_class or self.alpha < 1

    @property
    def needs_labels(self) -> str:
        return f'"alpha" is {self.alpha:g}: labels have the weight {1 - self.alpha:g}; set it to 1' * (self.alpha < 1)
