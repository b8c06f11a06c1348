"""Verdicts on defenses, from plain numbers: the strongest attack, the floor, headroom and efficiency."""
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
    """The strongest of the attacks on one teacher, by the mean of its seeds, and the floor.

    The strongest is the best of those tried: one of many is the best by chance, which errs on the thief's side.
    """

    attack: Name
    student: Sequence[float]
    floor: Sequence[float] = ()  # see `judge`; empty if there is none

    @property
    def headroom(self) -> float | None:
        """Points that the strongest attack gains over the floor."""
        return mean(self.student) - mean(self.floor) if self.floor else None

    @property
    def noise(self) -> float:
        """The larger standard deviation of the two that make the headroom; 0 for one seed."""
        return max((stdev(values) for values in (self.student, self.floor) if len(values) > 1), default=0.0)

    @property
    def has_headroom(self) -> bool:
        """Whether the strongest attack gains more over the floor than seeds differ."""
        return self.headroom is not None and self.headroom > self.noise


def judge(attempts: Mapping[Name, Attempt], floor: Sequence[float] = ()) -> Verdict[Name] | None:
    """The verdict on one teacher, given the attacks on it by name; None without an attack.

    floor: what protection cannot take, accuracies of a student of the thief's own labels, without a teacher. A thief
    without labels has the best student of the top classes alone, which no defense that keeps them changes.
    """
    if not attempts:
        return None
    strongest = max(attempts, key=lambda name: mean(attempts[name].accuracies))
    hard_labels = [attempt.accuracies for attempt in attempts.values() if attempt.top_class_only]
    return Verdict(strongest, attempts[strongest].accuracies, floor or max(hard_labels, key=mean, default=()))


def efficiency(unprotected: Verdict, protected: Verdict) -> float | None:
    """The part of the undefended teacher's headroom that a defense takes; None without headroom.

    Above 1, its students are worse than the floor of the undefended teacher, as where it is a worse teacher itself.
    """
    if unprotected.headroom is None or not unprotected.has_headroom:
        return None
    return (mean(unprotected.student) - mean(protected.student)) / unprotected.headroom


def format_efficiency(unprotected: Verdict | None, protected: Verdict) -> str:
    """`0.50`, `no headroom`, or nothing where there is no undefended teacher with a floor."""
    if unprotected is None or unprotected is protected or unprotected.headroom is None:
        return ""
    found = efficiency(unprotected, protected)
    return "no headroom" if found is None else f"{found:.2f}"
