"""Price of defended teachers for honest clients, and profile of their answers for students."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports.cells import (
    Cell,
    Collection,
    differing_settings,
    is_defense,
    kind_display_name,
    mean_std,
    network_display_name,
    rank,
)
from utils.results import is_number

# Metrics of `utils.quality`: column title, and number of decimals.
COLUMNS = {"accuracy": ("accuracy, %", 2), "cross_entropy": ("cross-entropy", 3), "calibration_error": ("ECE, %", 2),
           "risk_coverage_area": ("AURC, %", 2), "l1_change": ("L1 change", 3), "entropy": ("entropy", 3),
           "non_target_mass": ("non-target mass, %", 2), "peaks": ("peaks", 2), "cmi": ("CMI", 3),
           "separation": ("separation", 3), "rank_correlation": ("rank correlation", 3)}


@dataclass
class Prices:
    """Table with one row per teacher, answer defense and interface, and one column per metric."""

    title: str
    rows: dict[str, dict[str, str]]

    def lines(self) -> list[list[str]]:
        """Header, then one line per teacher; empty columns are left out."""
        keys = [key for key in COLUMNS if any(key in row for row in self.rows.values())]
        return [["", *(COLUMNS[key][0] for key in keys)],
                *([name, *(row.get(key, "") for key in keys)] for name, row in self.rows.items())]


def prices(collections: Sequence[Collection]) -> list[Prices]:
    """One table per collection with a defended teacher (trained-in defense, answer defense or interface)."""
    made = []
    for collection in collections:
        students = [cell for cell in collection.cells if cell.kind == "student"]
        victims = {cell.victim for cell in students}
        teachers = [cell for cell in collection.cells if cell.kind != "student" and not cell.ablation
                    and (cell.experiment in victims or is_defense(cell.kind))]
        protected = {(cell.victim, cell.answers): cell for cell in students
                     if cell.answers and cell.finished and cell.source == cell.victim}
        names: dict[Path | None, str] = {cell.experiment: _name(cell, teachers) for cell in teachers}
        rows = {(str(cell.experiment), ""): (names[cell.experiment], _row(cell, "outputs"))
                for cell in sorted(teachers, key=_sort_key)}
        rows |= {(str(place), answers): (f"{names[place]}, {answers}" if place in names else
                                         f"{_label(cell.teacher_kind, cell.teacher or '')}, {answers}",
                                         _row(cell, "answers"))
                 for (place, answers), cell in sorted(protected.items(), key=lambda item: (str(item[0][0]),
                                                                                           item[0][1]))}
        rows = {place: row for place, row in rows.items() if row[1]}
        defended = protected or [cell for cell in teachers if is_defense(cell.kind)]
        if rows and defended:
            words = [name for name, _ in rows.values()]
            made.append(Prices(f"Price and profile of the teachers' answers, {collection.title}", {
                name if words.count(name) == 1 else f"{name}, {place}": row for (place, _), (name, row) in rows.items()
            }))
    return made


def _sort_key(teacher: Cell) -> tuple[tuple[int, str], float]:
    """By kind, and by the strength of the defense."""
    return rank(teacher.kind), teacher.strength or 0.0


def _name(teacher: Cell, teachers: Sequence[Cell]) -> str:
    """Kind and network of a teacher, and the settings in which teachers of this kind differ."""
    like = [other for other in teachers if other.kind == teacher.kind]
    return ", ".join([_label(teacher.kind, teacher.network), *differing_settings(teacher, like)])


def _label(kind: str, network: str) -> str:
    return f"{kind_display_name(kind)} {network_display_name(network)}"


def _row(cell: Cell, entry: str) -> dict[str, str]:
    values = {key: list(_values(cell, entry, key)) for key in COLUMNS}
    return {key: mean_std(found, digits=COLUMNS[key][1]) for key, found in values.items() if found}


def _values(cell: Cell, entry: str, key: str) -> Iterable[float]:
    for run in cell.finished:
        row = run.results.details.get(entry) if run.results else None
        if isinstance(row, dict) and is_number(row.get(key)):
            yield row[key]
