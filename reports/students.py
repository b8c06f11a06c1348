"""Nasty Teacher tables: one row per teacher, one column per student, with data (Tables 1 to 3) or without."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reports.cells import (
    Cell,
    DeployedTeacher,
    StudentMethod,
    baseline_score,
    network_display_name,
    rank,
    student_method_name,
)
from reports.table import TEACHER, Header, Place, Table

NO_TEACHER = Header(("no teacher",), "no teacher")
TEACHER_ITSELF = Header(("itself",), "the teacher's own network")


class Group(NamedTuple):
    """Row of a table: students of one teacher in one directory."""

    network: str  # network of the teacher
    kind: str
    directory: Path | None = None  # directory of the students; None for a row of published values only
    source: Path | None = None  # experiment of the teacher
    answers: str = ""  # answers of the teacher; empty for logits


def fill(table: Table, students: Sequence[Cell], networks: Sequence[Cell], published: dict[str, Any]) -> Table:
    """Fill a table. Rows: networks without a teacher, then groups of students. Columns: teachers, then students.

    Differences are a student minus the same network without a teacher (or minus the normal teacher, if it has the
    teacher's network and the paper no other baseline), and a teacher minus the normal teacher.
    """
    teachers = {name: kinds for name, kinds in published.items() if name != "baseline"}
    if not teachers.keys() & {*(cell.network for cell in networks), *(cell.teacher for cell in students)}:
        teachers, published = {}, {}  # not the teachers of the paper, so its values do not apply
    baselines = published.get("baseline", {})
    groups = _groups(students, networks)
    published_groups = _published_groups(groups, teachers)
    rows = _headers(_in_order([*groups, *published_groups]))
    table.columns = [TEACHER, *map(_published_column, baselines)]

    def put(row: Header, column: Header, cell: Cell) -> None:
        place = table.put(Place(row, column), cell)
        if place.column not in table.columns:
            table.columns.append(place.column)

    for group, members in groups.items():
        for cell in members:
            itself = baselines and cell.network == cell.teacher and cell.network not in baselines
            put(rows[group], TEACHER_ITSELF if itself else _column(cell.network, cell.student_method), cell)
        for cell in networks:
            if cell.experiment == group.source and not group.answers:
                put(rows[group], TEACHER, cell)
        if members and group.answers:
            put(rows[group], TEACHER, DeployedTeacher.of(members[0]))
    for group, values in published_groups.items():
        for name, value in values.items():
            table.published[Place(rows[group], _published_column(name))] = (value,)
    table.published |= {Place(NO_TEACHER, _published_column(name)): (value,) for name, value in baselines.items()}
    table.columns += [column for _, column in table.published if column not in table.columns]
    baseline_cells = [cell for cell in networks if cell.kind == "normal"]
    if not students:
        table.columns += [column for cell in baseline_cells if (column := _column(cell.network)) not in table.columns]
    for column in dict.fromkeys(table.columns):
        same = [cell for cell in baseline_cells if cell.network == column.key[0]]
        if same:
            table.cells[Place(NO_TEACHER, column)] = max(same, key=lambda cell: baseline_score(cell, students))
    table.columns = list(dict.fromkeys(table.columns))
    table.rows = [NO_TEACHER] * any(row == NO_TEACHER for row, _ in [*table.cells, *table.published])
    table.rows += rows.values()
    table.leave_out_idle()
    _set_references(table, rows)
    return table


def _groups(students: Sequence[Cell], networks: Sequence[Cell]) -> dict[Group, list[Cell]]:
    groups: dict[Group, list[Cell]] = {}
    for cell in students:
        group = Group(cell.teacher or "", cell.teacher_kind, cell.experiment.parent, cell.source, cell.answers)
        groups.setdefault(group, []).append(cell)
    source_experiments = {cell.source for cell in students}
    for cell in networks:
        if cell.kind != "normal" and cell.experiment not in source_experiments:
            groups[Group(cell.network, cell.kind, cell.experiment.parent, cell.experiment)] = []
    return groups


def _published_groups(groups: Iterable[Group], teachers: dict[str, Any]) -> dict[Group, dict[str, float]]:
    """Published values by group: the only group of a teacher, or the one in the directory of the published experiments
    (`kd_nasty_resnet18`), or else a new group without directory."""
    found = {}
    for name, kinds in teachers.items():
        for kind, values in kinds.items():
            like = [group for group in groups if (group.network, group.kind, group.answers) == (name, kind, "")]
            named = [group for group in like if group.directory and group.directory.name == f"kd_{kind}_{name}"]
            its = named if len(named) == 1 else like if len(like) == 1 else [Group(name, kind)]
            found[its[0]] = values
    return found


def _in_order(groups: Iterable[Group]) -> list[Group]:
    groups = list(dict.fromkeys(groups))
    networks = list(dict.fromkeys(group.network for group in groups))
    return sorted(groups, key=lambda group: (networks.index(group.network), rank(group.kind), str(group.directory),
                                             str(group.source), group.answers))


def _headers(groups: Sequence[Group]) -> dict[Group, Header]:
    """Row headers, with the directory if groups have equal teachers, and the teacher's path if these are too."""
    heads = {}
    for group in groups:
        words = f"{group.kind} {network_display_name(group.network)}"
        words += f", answers {group.answers}" if group.answers else ""
        like = [other for other in groups if (*other[:2], other.answers) == (*group[:2], group.answers)]
        if len(like) > 1:
            words += f", {_distinguish(group.directory, [other.directory for other in like])}"
        if sum(other.directory == group.directory for other in like) > 1:
            words += f" from {_distinguish(group.source, [other.source for other in like])}"
        heads[group] = Header((group.network, group.kind, str(group.directory), str(group.source), group.answers),
                              words)
    return heads


def _distinguish(path: Path | None, others: Sequence[Path | None]) -> str:
    """Name of a path or, if another path has the same name, the whole path."""
    if path is None:
        return "the paper's"
    alike = {other for other in others if other and other.name == path.name}
    return path.name if len(alike) == 1 else str(path)


def _set_references(table: Table, rows: dict[Group, Header]) -> None:
    """Set the reference of each cell: for a student the network without a teacher, for a teacher the normal one (the
    one that it was made from, if known)."""
    for group, row in rows.items():
        normal = [Place(rows[other], TEACHER) for other in rows if other[:2] == (group.network, "normal")]
        for column in table.columns:
            place, no_teacher = Place(row, column), Place(NO_TEACHER, column)
            if column != TEACHER:
                others = [no_teacher, *(normal if column == TEACHER_ITSELF else [])]
                table.references[place] = table.published_references[place] = others
            elif group.kind != "normal":
                others = table.published_references[place] = [*normal, Place(NO_TEACHER, _column(group.network))]
                origin = table.cells[place].origin if place in table.cells else None
                table.references[place] = [other for other in others if origin is None or (
                    other in table.cells and table.cells[other].experiment == origin)]


def _column(network: str, method: StudentMethod = ()) -> Header:
    """Column of students of one network that learn in one way."""
    return Header((network, *method),
                  ", ".join(filter(None, [network_display_name(network), student_method_name(method)])))


def _published_column(name: str) -> Header:
    """Column of a published value: `net`, with data; `net dafl`, by a data-free method."""
    if name in ("teacher", "itself"):
        return TEACHER if name == "teacher" else TEACHER_ITSELF
    network, *method = name.split()
    return _column(network, tuple(method))
