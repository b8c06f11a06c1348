"""Tables of attacks on teachers: one row per attack, one column per teacher, for one student and one thief."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from reports.cells import Cell, Collection, baseline_score, mean_std, network_display_name, rank
from reports.table import Header, Place, Table
from reports.verdicts import Attempt, Verdict, format_efficiency, judge
from runs.stages import display_name
from utils.results import is_number

MAX_COLUMNS = 6  # teachers; with more, each is a row
TEACHER_ITSELF = Header(("teacher",), "the teacher itself")
NO_TEACHER = Header(("no teacher",), "no teacher: labels")


def is_theft(cell: Cell) -> bool:
    """True if the thief lacks labels or images, sends each image once or has a query budget, or the student is a
    control. The published tables of Nasty Teacher have no place for these students."""
    what = cell.description
    return what.role == "student" and what.uses_data and bool(
        what.control or what.images or not what.labels or what.queries == "once" or what.budget)


Teacher = tuple[Any, str]  # experiment of the attacked network, and its answer defense


@dataclass(frozen=True)
class Theft:
    """Students of one network and one thief: the table of attacks, and a verdict on each teacher."""

    network: str
    thief: str  # `labels`, `no labels`, `images of cifar100, no labels`, with the number of images if not all
    students: Sequence[Cell]
    teachers: dict[Teacher, Header]
    table: Table
    verdicts: dict[Header, Verdict[Header]]  # of teachers with finished students
    no_teacher: Cell | None  # the same network trained on the labels of as many images
    labels: bool  # whether the thief has labels

    @property
    def unprotected(self) -> Header | None:
        """Column of the normal teacher, to which the others are compared."""
        return _unprotected(self.verdicts)


def thefts(collection: Collection, own: Sequence[Cell]) -> list[Theft]:
    """Thefts by student network, thief (with labels, without labels, foreign images) and number of images."""
    groups: dict[tuple[str, bool, str, int | None], list[Cell]] = {}
    for cell in filter(is_theft, own):
        what = cell.description
        thief = cell.network, what.labels and what.reads_labels, what.images, cell.subset
        groups.setdefault(thief, []).append(cell)
    return [_theft(collection, own, cells, *thief) for thief, cells in groups.items()]


def attacks(collection: Collection, own: Sequence[Cell]) -> list[Table]:
    """One table per student network and thief."""
    return [theft.table for theft in thefts(collection, own)]


def _theft(collection: Collection, own: Sequence[Cell], students: Sequence[Cell], network: str, labels: bool,
           images: str, subset: int | None) -> Theft:
    data = f"images of {images}, no labels" if images else "labels" if labels else "no labels"
    thief = data + (f", {subset:,} images" if subset else "")
    table = Table(f"attacks {collection.name} {network} {data}" + f" {subset} images" * bool(subset),
                  f"Attacks, {collection.title}, student {network_display_name(network)}, {thief}{_queries(students)}",
                  figure="dots", epochs=("last",))
    teachers = _teachers(students, own)
    table.columns = [*teachers.values()]
    fixed = _without_teacher(own, students, network, subset)
    by_experiment = {cell.experiment: cell for cell in own}
    for (source, defense), column in teachers.items():
        if source in by_experiment and defense == "none":
            table.cells[Place(TEACHER_ITSELF, column)] = by_experiment[source]
        table.cells |= {Place(row, column): cell for row, cell in fixed.items()}
    words = row_labels(students, without="query_budget" if subset else "")
    for cell in sorted(students, key=lambda cell: _natural_sort_key(words[cell.experiment])):
        place = Place(Header(_key(cell), words[cell.experiment]), _column(cell, teachers))
        table.put(place, cell)
        table.references[place] = [Place(NO_TEACHER, column) for column in table.columns]
    table.rows = list(dict.fromkeys(row for row, _ in table.cells))
    table.columns = list(dict.fromkeys(column for _, column in table.cells))
    table.leave_out_idle((TEACHER_ITSELF, *fixed))
    verdicts = _verdicts(table, list(teachers.values()), fixed, labels=labels)
    table.notes, table.summary = _summary(verdicts)
    attacked = sum(column in table.columns for column in teachers.values())
    shown = replace(table.transposed(), figure="heat") if attacked > MAX_COLUMNS else table
    return Theft(network, thief, students, teachers, shown, verdicts, fixed.get(NO_TEACHER), labels)


def _without_teacher(own: Sequence[Cell], students: Sequence[Cell], network: str,
                     subset: int | None) -> dict[Header, Cell]:
    """The network trained on the labels of as many images, without and with label smoothing, by strength."""
    found: dict[Header, list[Cell]] = {}
    for cell in own:
        if cell.kind in ("normal", "smoothed") and (cell.network, cell.subset) == (network, subset):
            smoothing = cell.params["label_smoothing"]
            row = Header(("no teacher", str(smoothing)), f"no teacher: label smoothing {smoothing:g}") if smoothing \
                else NO_TEACHER
            found.setdefault(row, []).append(cell)
    rows = sorted(found, key=lambda row: float(row.key[1]) if row != NO_TEACHER else 0.0)
    return {row: max(found[row], key=lambda cell: baseline_score(cell, students)) for row in rows}


def row_labels(students: Iterable[Cell], without: str = "") -> dict[Any, str]:
    """Label of each student's attack, by experiment: display name, parameters that differ between attacks of that
    name, and interface. without: a parameter that is shown elsewhere."""
    students = list(students)
    values: dict[tuple[str, str], set[str]] = {}
    for cell in students:
        for key, value in cell.description.settings:
            values.setdefault((cell.description.method, key), set()).add(str(value))
    words, several = {}, len({cell.description.queries for cell in students}) > 1
    for cell in students:
        what = cell.description
        parts = [display_name(what.method)]
        parts += [f"{key} {value:g}" if is_number(value) else f"{key} {value}"
                  for key, value in what.settings if key != without and len(values[what.method, key]) > 1]
        parts += [f"queries {what.queries}"] * several
        parts += [f"{what.budget} images"] * bool(what.budget and without != "query_budget")
        parts += [what.interface] * (what.interface != "logits")
        words[cell.experiment] = ", ".join(parts)
    return words


def _natural_sort_key(words: str) -> list[tuple[float, str]]:
    """Sort key that orders 2 before 10."""
    return [(float(part), "") if part.replace(".", "", 1).isdecimal() else (0.0, part)
            for part in re.split(r"(\d+\.?\d*)", words)]


def _key(cell: Cell) -> tuple[str, ...]:
    what = cell.description
    settings = (f"{key} {value}" for key, value in what.settings)
    return what.method, *settings, what.interface, what.queries, str(what.budget or "")


def _teachers(students: Sequence[Cell], own: Sequence[Cell]) -> dict[Teacher, Header]:
    """Columns: kind and network of each teacher, its directory if these are ambiguous, and its answer defense."""
    victims: dict[Any, tuple[str, str]] = {}
    for cell in students:
        if not cell.description.control:
            there = next((other for other in own if other.experiment == cell.victim), None)
            victims[cell.victim] = (there.kind, there.network) if there else (cell.teacher_kind, cell.teacher or "")
    like = list(victims.values())
    words = {place: f"{kind} {network_display_name(network)}" + f", {place}" * (like.count((kind, network)) > 1)
             for place, (kind, network) in victims.items()}
    protected = dict.fromkeys((cell.victim, cell.description.answer_defense) for cell in students
                             if not cell.description.control)
    heads = {(place, defense): Header(("teacher", str(place), victims[place][0], defense),
                                    words[place] + f", {defense}" * (defense != "none"))
             for place, defense in protected}
    return dict(sorted(heads.items(), key=lambda item: (rank(victims[item[0][0]][0]), item[0][1] != "none",
                                                        item[1].label)))


def _column(cell: Cell, teachers: dict[Teacher, Header]) -> Header:
    control = cell.description.control
    return Header(("control", control), display_name(control)) if control else \
        teachers[cell.victim, cell.description.answer_defense]


def _queries(students: Sequence[Cell]) -> str:
    """`, N queries` if all students sent the same number of queries, otherwise empty."""
    counts = {count for cell in students if not cell.description.control and cell.source == cell.victim
              for run in cell.finished if run.results for count in run.results.queries.values()}
    return f", {counts.pop():,} queries" if len(counts) == 1 else ""


def _verdicts(table: Table, teachers: Sequence[Header], fixed: dict[Header, Cell], *,
              labels: bool) -> dict[Header, Verdict[Header]]:
    """Verdict on each teacher, from the last epoch of its students. labels: whether the thief has labels, and so can
    train the students without a teacher in `fixed`."""
    found = {}
    no_teacher = max(filter(None, map(_last, fixed.values())), key=mean, default=[]) if labels else []
    for column in teachers:
        cells = {row: cell for row in table.rows if row not in fixed and row != TEACHER_ITSELF
                 if (cell := table.cells.get(Place(row, column)))}
        verdict = judge({row: Attempt(values, cell.description.top_class_only) for row, cell in cells.items()
                         if (values := _last(cell))}, no_teacher)
        if verdict:
            found[column] = verdict
    return found


def _unprotected(verdicts: Iterable[Header]) -> Header | None:
    return next((column for column in verdicts if column.key[2:] == ("normal", "none")), None)


def _summary(verdicts: dict[Header, Verdict[Header]]) -> tuple[list[str], list[list[str]]]:
    """Strongest attack on each teacher, and fraction of the headroom that a defense takes: sentences, and a table
    with one row per teacher."""
    normal = _unprotected(verdicts)
    unprotected = verdicts[normal] if normal else None
    lines = [["teacher", "strongest attack", "its student", "floor", "efficiency"]]
    lines += [[column.label, verdict.attack.label, mean_std(verdict.student),
               mean_std(verdict.floor) if verdict.floor else "", format_efficiency(unprotected, verdict)]
              for column, verdict in verdicts.items()]
    kept = [place for place in range(len(lines[0])) if place < 3 or any(line[place] for line in lines[1:])]
    lines = [[line[place] for place in kept] for line in lines]
    headroom = unprotected.headroom if unprotected else None
    notes = [] if headroom is None else [f"Headroom above the floor: {headroom:.2f} points."]
    return notes, lines if verdicts else []


def _last(cell: Cell) -> list[float]:
    return list(cell.values("last").values())
