"""Tradeoffs of protection: accuracy of a defended teacher against accuracy of the strongest attack's student."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from reports.attacks import Teacher, Theft, thefts
from reports.cells import (
    RECIPE,
    Cell,
    Collection,
    DeployedTeacher,
    differing_settings,
    is_defense,
    kind_display_name,
    mean_std,
    network_display_name,
)
from reports.table import Header
from reports.verdicts import Verdict, format_efficiency
from runs.stages import answer_defense_name

NOT_DEFENSES = ("poisoned", "student", "unknown")  # kinds of attacked networks without a known defense


@dataclass(frozen=True)
class Point:
    """An attacked teacher."""

    strength: float | None  # strength of its defense
    teacher: Sequence[float]  # accuracy of its answers to clients in percent, one value per seed
    verdict: Verdict[Header]


@dataclass
class Series:
    """Teachers that differ only in the strength of their defense, by strength."""

    name: str  # name of the defense; empty without defense
    parameter: str  # parameter that is the strength; empty for an answer defense or without one
    answers: bool  # whether the defense changes the answers, not the training
    points: list[Point]

    @property
    def unprotected(self) -> bool:
        return not self.answers and not self.name

    @property
    def title(self) -> str:
        """Name of the series, with the strength if there is one point; several points show their own."""
        name, strength = self.name or "no defense", self.points[0].strength
        if len(self.points) > 1:
            return f"{name}, by {self.parameter}" if self.parameter else name
        if strength is None:
            return name
        return f"{name}, {self.parameter} {strength:g}" if self.parameter else f"{name} {strength:g}"


@dataclass
class Tradeoff:
    """One figure and one table: the defenses that one thief attacked, for one student network."""

    name: str  # for files
    title: str
    series: list[Series]  # undefended teachers first
    references: dict[str, list[float]]  # accuracies of reference students, by their training signal

    def table(self) -> list[list[str]]:
        """Header, then one line per teacher."""
        lines = [["defense", "strength", "teacher, %", "strongest attack", "its student, %",
                  "floor, %", "efficiency"]]
        unprotected = next((series.points[0].verdict for series in self.series if series.unprotected), None)
        for series in self.series:
            for point in series.points:
                strength = "" if point.strength is None else f"{series.parameter} {point.strength:g}".strip()
                lines.append([series.name or "none", strength, mean_std(point.teacher), point.verdict.attack.label,
                              mean_std(point.verdict.student),
                              mean_std(point.verdict.floor) if point.verdict.floor else "",
                              format_efficiency(unprotected, point.verdict)])
        kept = [place for place in range(len(lines[0])) if place < 5 or any(line[place] for line in lines[1:])]
        return [[line[place] for place in kept] for line in lines]


def tradeoffs(collections: Sequence[Collection]) -> list[Tradeoff]:
    """One tradeoff per student network and thief that attacked a defended teacher."""
    found = []
    for collection in collections:
        own = [cell for cell in collection.cells if not cell.ablation and not cell.backdoor]
        found += [made for theft in thefts(collection, own) if (made := _tradeoff(collection, own, theft))]
    return found


def _tradeoff(collection: Collection, own: Sequence[Cell], theft: Theft) -> Tradeoff | None:
    by_experiment = {cell.experiment: cell for cell in own}
    groups: dict[Hashable, list[tuple[Teacher, Point]]] = {}
    for teacher, head in theft.teachers.items():
        accuracies = _accuracies(teacher, theft.students, by_experiment.get(teacher[0]))
        kind, answers = head.key[2], teacher[1]
        if head in theft.verdicts and accuracies and (kind not in NOT_DEFENSES or answers != "none"):
            key, strength = _split_strength(teacher, by_experiment.get(teacher[0]))
            groups.setdefault(key, []).append((teacher, Point(strength, accuracies, theft.verdicts[head])))
    kinds = {teacher: head.key[2] for teacher, head in theft.teachers.items()}
    names = _names([members[0][0] for members in groups.values()], kinds, by_experiment)
    series = []
    for members in groups.values():
        teacher = members[0][0]
        cell = by_experiment.get(teacher[0])
        parameter = cell.description.strength if cell and teacher[1] == "none" else ""
        points = sorted((point for _, point in members), key=lambda point: point.strength or 0.0)
        series.append(Series(names[teacher], parameter, teacher[1] != "none", points))
    series.sort(key=lambda each: (not each.unprotected, each.answers))
    normal = theft.verdicts.get(theft.unprotected) if theft.unprotected else None
    references = {"labels, no teacher": list(theft.no_teacher.values("last").values()) if theft.no_teacher else [],
                  "hard labels of the normal teacher": list(normal.floor) if normal and not theft.labels else []}
    shown = [teacher for members in groups.values() for teacher, _ in members]
    if not any(is_defense(kinds[teacher]) or teacher[1] != "none" for teacher in shown):
        return None
    return Tradeoff(f"tradeoff {theft.table.name.removeprefix('attacks ')}",
                    f"Protection and its price, {collection.title}, student {network_display_name(theft.network)}, "
                    f"{theft.thief}, last epoch", series,
                    {name: values for name, values in references.items() if values})


def _accuracies(teacher: Teacher, students: Sequence[Cell], network: Cell | None) -> list[float]:
    """Accuracy of a teacher's answers to clients, by seed: of the network at its last epoch or, behind an answer
    defense, as its students evaluated it before training."""
    if teacher[1] == "none":
        return list(network.values("last").values()) if network else []
    found: dict[int, float] = {}
    direct = [cell for cell in students if not cell.description.control
              and (cell.source, cell.description.answer_defense) == teacher]
    for cell in sorted(direct, key=lambda cell: cell.description.interface == "logits"):  # rounding may change ties
        found |= DeployedTeacher.of(cell).values("last")
    return [found[seed] for seed in sorted(found)]


def _split_strength(teacher: Teacher, network: Cell | None) -> tuple[Hashable, float | None]:
    """Key that teachers of one series share, and the strength of a teacher's defense."""
    place, defense = teacher
    if defense != "none":
        name, _, strength = defense.partition(":")
        return (str(place), name), float(strength) if _is_number(strength) else None
    if network is None:
        return str(place), None
    what = network.description
    other_settings = tuple((key, str(setting)) for key, setting in what.settings if key != what.strength)
    recipe = tuple(str(network.params.get(key)) for key in RECIPE)
    if network.strength is None:
        return str(place), None
    return (what.kind, network.network, other_settings, recipe), network.strength


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(teachers: Sequence[Teacher], kinds: dict[Teacher, str],
           by_experiment: dict[Any, Cell]) -> dict[Teacher, str]:
    """Name of each series: its defense, with the settings that differ between series of that defense (text settings
    only if not the default); empty without a defense."""
    def trained(teacher: Teacher) -> str:
        if kinds[teacher] in ("normal", *NOT_DEFENSES):
            return ""
        name = kind_display_name(kinds[teacher])
        cell = by_experiment.get(teacher[0])
        like = [by_experiment[other[0]] for other in teachers
                if kinds[other] == kinds[teacher] and other[0] in by_experiment]
        return ", ".join([name, *(differing_settings(cell, like, without=cell.description.strength) if cell else [])])

    names = {}
    for teacher in teachers:
        place, defense = teacher
        own = trained(teacher)
        if defense != "none" and own:
            _, strength = _split_strength((place, "none"), by_experiment.get(place))
            own += "" if strength is None else f" {strength:g}"
        names[teacher] = " + ".join(filter(None, [own, _answer_defense(defense)]))
    words = list(names.values())
    return {teacher: f"{name}, {teacher[0]}" if name and words.count(name) > 1 else name
            for teacher, name in names.items()}


def _answer_defense(specification: str) -> str:
    """Display name of an answer defense, without its strength if that is a number."""
    name, _, strength = specification.partition(":")
    if name == "none":
        return ""
    words = answer_defense_name(name)
    return f"{words} {strength}" if strength and not _is_number(strength) else words
