"""ABD's tables, accuracy / attack success rate: one row per trigger, one column per way to learn from its teacher."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.cells import (
    DEFENSES,
    Cell,
    Collection,
    StudentMethod,
    baseline_score,
    network_display_name,
    student_method_name,
)
from reports.table import TEACHER, Header, Place, Table

CLEAN = Header(("no backdoor",), "no backdoor")
DATA = "data"  # pseudo-method of students with data


def backdoors(collection: Collection, own: Sequence[Cell], published: dict[str, Any]) -> list[Table]:
    """One table per teacher network, student network and data-free method, and one per teacher network without such
    students. published: values by the two networks, trigger and way to learn."""
    pairs: dict[tuple[str, str], list[Cell]] = {}
    for cell in own:
        if cell.backdoor and cell.kind == "student":
            pairs.setdefault((cell.teacher or "", cell.network), []).append(cell)
    made = []
    for (teacher, student), cells in pairs.items():
        methods = dict.fromkeys(_method(cell) for cell in cells)
        for method in [method for method in methods if method != DATA] or [DATA]:
            wanted = {cell.backdoor for cell in cells if _method(cell) == method}
            chosen = [cell for cell in cells if _method(cell) in (method, DATA) and cell.backdoor in wanted]
            words = "" if method == DATA else f"{student_method_name((method,))} from "
            table = _table(f"{collection.name} {method} {teacher} {student}",
                           f"{collection.title}, {words}{network_display_name(teacher)} to "
                           f"{network_display_name(student)}")
            made.append(_fill(table, teacher, chosen, own, {
                trigger: {key: values for key, values in row.items() if key.split()[0] in ("teacher", DATA, method)}
                for trigger, row in published.get(f"{teacher} {student}", {}).items() if method in row}))
    for teacher in dict.fromkeys(cell.network for cell in own if cell.backdoor and cell.kind == "poisoned"):
        if not any(teacher == other for other, _ in pairs):
            table = _table(f"{collection.name} {teacher}", f"{collection.title}, {network_display_name(teacher)}")
            made.append(_fill(table, teacher, [], own, {}))
    return made


def _table(name: str, title: str) -> Table:
    return Table(f"backdoors {name}", f"Backdoors, {title}: accuracy / attack success rate",
                 keys=("test_accuracy", "asr"), more=("base_rate", "target_recall"),
                 detail_rows={"reestimated_batch_norm": "re-estimated batch norm"})


def _fill(table: Table, teacher: str, students: Sequence[Cell], own: Sequence[Cell],
          published: dict[str, dict[str, list[float]]]) -> Table:
    """Fill a table. Rows: a clean network like the teacher, then the poisoned teachers of these students or, without
    students, all poisoned teachers. Columns: teacher, student with data, the method and its backdoor defenses."""
    teachers = [cell for cell in own if cell.backdoor and cell.kind == "poisoned" and cell.network == teacher]
    clean = [cell for cell in own if cell.kind == "normal" and cell.network == teacher]
    if clean:
        table.put(Place(CLEAN, TEACHER), max(clean, key=lambda cell: baseline_score(cell, teachers)))
    triggers = {cell.backdoor for cell in students or teachers}
    cells = [*(cell for cell in teachers if cell.backdoor in triggers), *students]
    rows = list(dict.fromkeys((cell.backdoor or "", _teacher(cell)) for cell in cells))
    triggered = [trigger for trigger, _ in rows]
    heads = {(trigger, source): Header((trigger, str(source)), trigger if triggered.count(trigger) == 1 else
                                     f"{trigger}, {source}") for trigger, source in rows}
    for cell in cells:
        column = TEACHER if cell.kind == "poisoned" else _column(_method(cell), cell.student_method, cell.answers)
        table.put(Place(heads[cell.backdoor or "", _teacher(cell)], column), cell)
    for trigger, methods in published.items():
        alike = [head for (other, _), head in heads.items() if other == trigger]
        row = alike[0] if len(alike) == 1 else Header((trigger,), trigger)
        for key, values in methods.items():
            student_method = tuple(key.split())
            column = TEACHER if key == "teacher" else _column(
                student_method[0], () if student_method == (DATA,) else student_method)
            table.published[Place(row, column)] = tuple(values)
    places = [*table.cells, *table.published]
    table.rows = list(dict.fromkeys(row for row, _ in places))
    table.columns = sorted(dict.fromkeys(column for _, column in places), key=_order)
    table.leave_out_idle()
    return table


def _method(cell: Cell) -> str:
    """Data-free method, or `DATA`."""
    return DATA if cell.description.uses_data else cell.description.method


def _teacher(cell: Cell) -> Path | None:
    """Experiment of a student's teacher, or of the teacher itself."""
    return cell.source if cell.kind == "student" else cell.experiment


def _column(method: str, student_method: StudentMethod, answers: str = "") -> Header:
    """Column of students that learn in one way, with or without data, from one kind of answers."""
    words = ["with data" if method == DATA else "", student_method_name(student_method),
             f"answers {answers}" if answers else ""]
    return Header((method, *student_method[method != DATA:], *filter(None, [answers])), ", ".join(filter(None, words)))


def _order(column: Header) -> tuple[bool, bool, int, list[int]]:
    """Sort key: teacher, student with data, method, method with each backdoor defense, continued students."""
    order = [list(DEFENSES).index(step) if step in DEFENSES else len(DEFENSES) for step in column.key[1:]]
    return column != TEACHER, column.key[0] != DATA, max(len(order), 1), order
