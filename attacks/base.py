"""Base class of attacks, and functions that attacks share."""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from attacks.params import AttackParams, WeightedParams
from utils.data import Batch
from utils.evaluation import Frozen
from utils.losses import cross_entropy
from utils.method import Method

__all__ = ["Attack", "AttackParams", "WeightedParams", "classes", "weighted_terms"]


class Attack(Method):
    """Loss that trains a student on a teacher's answers. Trained parameters of an attack: see `utils.method.Method`.

    A subclass defines `Params`, which also declare how the attack uses labels.
    """

    Params: ClassVar[type[AttackParams]] = AttackParams
    params: AttackParams

    def learn_defense(self, defend: Callable[[Tensor], Tensor], answers: Tensor) -> str:
        """Learn to undo a known answer defense, and return a line for the log, or "". Called before the first epoch if
        `params.needs_all_answers`.

        Args:
            defend: maps logits or log-probabilities (N, C) to the interface's answers, log-probabilities (N, C).
            answers: float32 (N, C), log-probabilities, the interface's answers to all training images. `batch.index`
                selects rows.
        """
        return ""

    def await_answers(self, teacher: Frozen, log: Callable[[str], None]) -> None:
        """Call `learn_defense` as soon as the teacher has answered all images, if the attack needs them and the teacher
        has an answer defense or interface."""
        defend = teacher.answers
        if defend and self.params.needs_all_answers:
            def learn(table: Tensor) -> None:
                if line := self.learn_defense(defend, table):
                    log(line)

            teacher.on_answers_ready = learn

    @abstractmethod
    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        """Loss of one batch and its terms by name, scalars that are logged: `{"loss": ..., name: ...}`.

        Args:
            student: network in training mode; maps images to logits (B, C).
            batch: images float32 (B, 3, H, W), labels int64 (B,) or None for a thief without labels, index int64 (B,),
                epoch float32 ().
            answers: float32 (B, C), log-probabilities up to a constant per row (such as logits); -inf where the
                interface returned exactly 0.
        """


def classes(batch: Batch, answers: Tensor) -> Tensor:
    """Class of each image, int64 (B,): its label or, for a thief without labels, the top class of its answer (in a tie,
    the lowest index)."""
    return answers.argmax(1) if batch.labels is None else batch.labels


def weighted_terms(logits: Tensor, batch: Batch, *, alpha: float, **term: Tensor) -> dict[str, Tensor]:
    """Loss `alpha` * term + (1 - `alpha`) * CE(logits, labels) and its terms, for one term, given by its name.

    Without labels the loss is the term. Raises ValueError without labels if `alpha` is not 1.
    """
    (value,) = term.values()  # the only one, whatever its name
    if batch.labels is None:
        if alpha != 1:
            raise ValueError(f"the batch has no labels, but alpha is {alpha:g}, which weighs labels by {1 - alpha:g}: "
                             "set alpha to 1, or pass Batch(images, labels)")
        return {"loss": value, **term}
    ce = cross_entropy(logits, batch.labels)
    return {"loss": alpha * value + (1 - alpha) * ce, **term, "cross_entropy": ce}
