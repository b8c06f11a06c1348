"""Verdicts on defenses, from plain numbers: strongest attack, floor, headroom and efficiency."""
from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Attempt:
    """Students of one attack on one teacher."""

    accuracies: Sequence[float]  # percent, one value per seed; at least one
    top_class_only: bool = False  # whether the students only use the top class of an answer


@dataclass(frozen=True)
class Verdict(Generic[Name]):
    """Strongest attack on one teacher, by the mean over seeds, and the floor.

    The strongest attack is the maximum over those tried, which favors the thief.
    """

    attack: Name
    student: Sequence[float]
    floor: Sequence[float] = ()  # see `judge`; empty if there is none

    @property
    def headroom(self) -> float | None:
        """Strongest attack minus floor, percentage points; None without a floor."""
        return mean(self.student) - mean(self.floor) if self.floor else None

    @property
    def noise(self) -> float:
        """Larger of the standard deviations of student and floor over seeds, percentage points; 0 for one seed."""
        return max((stdev(values) for values in (self.student, self.floor) if len(values) > 1), default=0.0)

    @property
    def has_headroom(self) -> bool:
        """True if the headroom exceeds the noise."""
        return self.headroom is not None and self.headroom > self.noise


def judge(attempts: Mapping[Name, Attempt], floor: Sequence[float] = ()) -> Verdict[Name] | None:
    """Verdict on one teacher, given the attacks on it by name; None without an attack.

    floor: accuracies of a student without a teacher, for a thief with labels. If empty, the floor is the best student
    that only uses top classes, which a defense that keeps the top classes cannot change.
    """
    if not attempts:
        return None
    strongest = max(attempts, key=lambda name: mean(attempts[name].accuracies))
    hard_labels = [attempt.accuracies for attempt in attempts.values() if attempt.top_class_only]
    return Verdict(strongest, attempts[strongest].accuracies, floor or max(hard_labels, key=mean, default=()))


def efficiency(unprotected: Verdict, protected: Verdict) -> float | None:
    """Fraction of the unprotected teacher's headroom that a defense takes; None without headroom.

    Above 1, the students are below the floor of the unprotected teacher, for example because the protected teacher is
    less accurate.
    """
    if unprotected.headroom is None or not unprotected.has_headroom:
        return None
    return (mean(unprotected.student) - mean(protected.student)) / unprotected.headroom


def format_efficiency(unprotected: Verdict | None, protected: Verdict) -> str:
    """`0.50`, `no headroom`, or empty without an unprotected teacher with a floor."""
    if unprotected is None or unprotected is protected or unprotected.headroom is None:
        return ""
    found = efficiency(unprotected, protected)
    return "no headroom" if found is None else f"{found:.2f}"
