"""Verdicts on defenses, from plain numbers: the strongest attack, the floor of hard labels, headroom and efficiency."""
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Attempt:
    """An attack's students of one teacher."""

    accuracies: Sequence[float]  # in percent, one a seed; at least one
    top_class_only: bool = False  # whether the students learn no more of an answer than its top class


@dataclass(frozen=True)
class Verdict(Generic[Name]):
    """The strongest of the attacks on one teacher, by the mean of its seeds, and the best student of hard labels.

    The strongest is the best of those tried: one of many is the best by chance, which errs on the thief's side.
    """

    attack: Name
    student: Sequence[float]
    hard_labels: Sequence[float] = ()  # the floor of every defense that keeps the top class; empty if none was tried

    @property
    def headroom(self) -> float | None:
        """Points that the strongest attack gains over hard labels."""
        return mean(self.student) - mean(self.hard_labels) if self.hard_labels else None

    @property
    def noise(self) -> float:
        """The larger standard deviation of the two that make the headroom; 0 for one seed."""
        return max((stdev(values) for values in (self.student, self.hard_labels) if len(values) > 1), default=0.0)

    @property
    def has_headroom(self) -> bool:
        """Whether the strongest attack gains more over hard labels than seeds differ."""
        return self.headroom is not None and self.headroom > self.noise


def judge(attempts: Mapping[Name, Attempt]) -> Verdict[Name] | None:
    """The verdict on one teacher, given the attacks on it by name; None without an attack."""
    if not attempts:
        return None
    strongest = max(attempts, key=lambda name: mean(attempts[name].accuracies))
    hard_labels = [attempt.accuracies for attempt in attempts.values() if attempt.top_class_only]
    return Verdict(strongest, attempts[strongest].accuracies, max(hard_labels, key=mean, default=()))


def efficiency(undefended: Verdict, defended: Verdict) -> float | None:
    """The part of the undefended teacher's headroom that a defense takes; None without headroom.

    Above 1, the defense costs the defended teacher accuracy of its own, and its students with it.
    """
    if undefended.headroom is None or not undefended.has_headroom:
        return None
    return (mean(undefended.student) - mean(defended.student)) / undefended.headroom


def efficiency_in_words(undefended: Verdict | None, defended: Verdict) -> str:
    """`0.50`, `no headroom`, or nothing where there is no undefended teacher with a student of hard labels."""
    if undefended is None or undefended is defended or undefended.headroom is None:
        return ""
    found = efficiency(undefended, defended)
    return "no headroom" if found is None else f"{found:.2f}"
