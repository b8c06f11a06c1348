"""Tables of attacks: a row an attack, a column a teacher, for one student and one kind of thief."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from reports.cells import Cell, Collection, in_words, nearness, rank, spread
from reports.table import Head, Place, Table
from runs.stages import display_name
from utils.results import is_number

MOST_COLUMNS = 6  # teachers; more of them are rows
ITSELF = Head(("teacher",), "the teacher itself")
ALONE = Head(("no teacher",), "no teacher: labels")


def is_theft(cell: Cell) -> bool:
    """Whether a student is one of a thief who lacks labels or images, counts queries, or is a control: no published
    table of Nasty Teacher has a place for it."""
    what = cell.description
    return what.role == "student" and what.uses_data and bool(
        what.control or what.images or not what.labels or what.queries == "once" or what.budget)


def attacks(collection: Collection, own: Sequence[Cell]) -> list[Table]:
    """A table for each student network and each kind of thief: with labels, without, or with foreign images."""
    groups: dict[tuple[str, bool, str], list[Cell]] = {}
    for cell in filter(is_theft, own):
        what = cell.description
        groups.setdefault((cell.network, what.labels and what.reads_labels, what.images), []).append(cell)
    return [_table(collection, own, cells, *thief) for thief, cells in groups.items()]


def _table(collection: Collection, own: Sequence[Cell], students: Sequence[Cell], network: str, labels: bool,
           images: str) -> Table:
    whose = f"images of {images}, no labels" if images else "labels" if labels else "no labels"
    table = Table(f"attacks {collection.name} {network} {whose}",
                  f"Attacks, {collection.title}, student {in_words(network)}, {whose}{_queries(students)}",
                  figure="dots", epochs=("last",))
    teachers = _teachers(students, own)
    table.columns = [*teachers.values()]
    alone = [cell for cell in own if cell.kind == "normal" and cell.network == network]
    smoothed = sorted((cell for cell in own if cell.kind == "smoothed" and cell.network == network),
                      key=lambda cell: cell.params["label_smoothing"])
    fixed = {ALONE: max(alone, key=lambda cell: nearness(cell, students))} if alone else {}
    fixed |= {Head(("no teacher", str(cell.params["label_smoothing"])),
                   f"no teacher: label smoothing {cell.params['label_smoothing']:g}"): cell for cell in smoothed}
    by_experiment = {cell.experiment: cell for cell in own}
    for (source, defense), column in teachers.items():
        if source in by_experiment and defense == "none":
            table.cells[Place(ITSELF, column)] = by_experiment[source]
        table.cells |= {Place(row, column): cell for row, cell in fixed.items()}
    words = row_words(students)
    for cell in sorted(students, key=lambda cell: _by_number(words[cell.experiment])):
        place = Place(Head(_key(cell), words[cell.experiment]), _column(cell, teachers))
        table.put(place, cell)
        table.references[place] = [Place(ALONE, column) for column in table.columns]
    table.rows = list(dict.fromkeys(row for row, _ in table.cells))
    table.columns = list(dict.fromkeys(column for _, column in table.cells))
    table.notes, table.summary = _summary(table, list(teachers.values()), fixed)
    return replace(table.transposed(), figure="heat") if len(teachers) > MOST_COLUMNS else table


def row_words(students: Iterable[Cell], without: str = "") -> dict[Any, str]:
    """What each student's attack is called, by its experiment: the name, the parameters in which attacks of one name
    differ, and what the teacher lets out. without: a parameter that is shown elsewhere."""
    students = list(students)
    values: dict[tuple[str, str], set[str]] = {}
    for cell in students:
        for key, value in cell.description.settings:
            values.setdefault((cell.description.method, key), set()).add(str(value))
    words = {}
    for cell in students:
        what = cell.description
        parts = [display_name(what.method)]
        parts += [f"{key} {value:g}" if is_number(value) else f"{key} {value}"
                  for key, value in what.settings if key != without and len(values[what.method, key]) > 1]
        parts += [f"queries {what.queries}"] * (len({other.description.queries for other in students}) > 1)
        parts += [f"{what.budget} images"] * bool(what.budget and without != "query_budget")
        parts += [what.interface] * (what.interface != "logits")
        words[cell.experiment] = ", ".join(parts)
    return words


def _by_number(words: str) -> list[tuple[float, str]]:
    """A sort key by which 2 comes before 10."""
    return [(float(part), "") if part.replace(".", "", 1).isdecimal() else (0.0, part)
            for part in re.split(r"(\d+\.?\d*)", words)]


def _key(cell: Cell) -> tuple[str, ...]:
    what = cell.description
    settings = (f"{key} {value}" for key, value in what.settings)
    return what.method, *settings, what.interface, what.queries, str(what.budget or "")


Teacher = tuple[Any, str]  # the experiment of the attacked network, and the answer defense in front of it


def _teachers(students: Sequence[Cell], own: Sequence[Cell]) -> dict[Teacher, Head]:
    """The columns: kind and network of the teacher, where it lies if that is not enough, and its answer defense."""
    victims: dict[Any, tuple[str, str]] = {}
    for cell in students:
        if not cell.description.control:
            there = next((other for other in own if other.experiment == cell.victim), None)
            victims[cell.victim] = (there.kind, there.network) if there else (cell.teacher_kind, cell.teacher or "")
    like = list(victims.values())
    words = {place: f"{kind} {in_words(network)}" + f", {place}" * (like.count((kind, network)) > 1)
             for place, (kind, network) in victims.items()}
    defended = dict.fromkeys((cell.victim, cell.description.answer_defense) for cell in students
                             if not cell.description.control)
    heads = {(place, defense): Head(("teacher", str(place), victims[place][0], defense),
                                    words[place] + f", {defense}" * (defense != "none"))
             for place, defense in defended}
    return dict(sorted(heads.items(), key=lambda item: (rank(victims[item[0][0]][0]), item[0][1] != "none",
                                                        item[1].words)))


def _column(cell: Cell, teachers: dict[Teacher, Head]) -> Head:
    control = cell.description.control
    return Head(("control", control), display_name(control)) if control else \
        teachers[cell.victim, cell.description.answer_defense]


def _queries(students: Sequence[Cell]) -> str:
    """The number of queries, where all students have made the same number."""
    counts = {count for cell in students if not cell.description.control and cell.source == cell.victim
              for run in cell.finished if run.results for count in run.results.queries.values()}
    return f", {counts.pop():,} queries" if len(counts) == 1 else ""


def _summary(table: Table, teachers: Sequence[Head],
             fixed: dict[Head, Cell]) -> tuple[list[str], list[list[str]]]:
    """The strongest attack on each teacher by the mean of its last epochs, and what a defense takes of the headroom:
    sentences, and a table with a line for each teacher."""
    attacks = {column: {row: values for row in table.rows if row not in fixed and row != ITSELF
                        if (cell := table.cells.get(Place(row, column))) and (values := _last(cell))}
               for column in teachers}
    best = {column: max(found, key=lambda row: mean(found[row])) for column, found in attacks.items() if found}
    labels_only = {column: [values for row, values in found.items()
                            if table.cells[Place(row, column)].description.top_class_only]
                   for column, found in attacks.items()}
    floor = {column: max(found, key=mean) for column, found in labels_only.items() if found}
    normal = next((column for column in best if column.key[2:] == ("normal", "none")), None)
    headroom = mean(attacks[normal][best[normal]]) - mean(floor[normal]) if normal and normal in floor else None
    noise = max((stdev(values) for values in (attacks[normal][best[normal]], floor[normal]) if len(values) > 1),
                default=0.0) if normal and normal in floor else 0.0
    lines = [["teacher", "strongest attack", "its student", "student of hard labels", "efficiency"]]
    for column, row in best.items():
        efficiency = ""
        if normal and column != normal and headroom is not None:
            lost = mean(attacks[normal][best[normal]]) - mean(attacks[column][row])
            efficiency = f"{lost / headroom:.2f}" if headroom > noise else "no headroom"
        lines.append([column.words, row.words, spread(attacks[column][row]),
                      spread(floor[column]) if column in floor else "", efficiency])
    kept = [place for place in range(len(lines[0])) if place < 3 or any(line[place] for line in lines[1:])]
    lines = [[line[place] for place in kept] for line in lines]
    notes = [] if headroom is None else [f"Headroom above hard labels: {headroom:.2f} points."]
    return notes, lines if best else []


def _last(cell: Cell) -> list[float]:
    return list(cell.values("last").values())
