"""ABD's tables: a row a trigger, a column a way to learn from its teacher, accuracy / attack success rate."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reports.cells import DEFENSES, METHODS, Cell, Collection, in_words, method_in_words, nearness
from reports.table import TEACHER, Head, Place, Table

CLEAN = Head(("no backdoor",), "no backdoor")


def backdoors(collection: Collection, own: Sequence[Cell], published: dict[str, Any]) -> list[Table]:
    """A table for each teacher's and student's network and each method without data, and one for teachers without such
    students. published: by the two networks, trigger and way to learn."""
    pairs: dict[tuple[str, str], list[Cell]] = {}
    for cell in own:
        if cell.backdoor and cell.kind == "student":
            pairs.setdefault((cell.teacher or "", cell.network), []).append(cell)
    made = []
    for (teacher, student), cells in pairs.items():
        methods = dict.fromkeys(_method(cell) for cell in cells)
        for method in [method for method in methods if method != "kd"] or ["kd"]:
            wanted = {cell.backdoor for cell in cells if _method(cell) == method}
            chosen = [cell for cell in cells if _method(cell) in (method, "kd") and cell.backdoor in wanted]
            words = "" if method == "kd" else f"{METHODS.get(method, method)} from "
            table = _table(f"{collection.name} {method} {teacher} {student}",
                           f"{collection.title}, {words}{in_words(teacher)} to {in_words(student)}")
            made.append(_fill(table, teacher, chosen, own, {
                trigger: {key: values for key, values in row.items() if key.split()[0] in ("teacher", "kd", method)}
                for trigger, row in published.get(f"{teacher} {student}", {}).items() if method in row}))
    for teacher in dict.fromkeys(cell.network for cell in own if cell.backdoor and cell.kind == "poisoned"):
        if not any(teacher == other for other, _ in pairs):
            table = _table(f"{collection.name} {teacher}", f"{collection.title}, {in_words(teacher)}")
            made.append(_fill(table, teacher, [], own, {}))
    return made


def _table(name: str, title: str) -> Table:
    return Table(f"backdoors {name}", f"Backdoors, {title}: accuracy / attack success rate",
                 keys=("test_accuracy", "asr"), more=("base_rate", "target_recall"))


def _fill(table: Table, teacher: str, students: Sequence[Cell], own: Sequence[Cell],
          published: dict[str, dict[str, list[float]]]) -> Table:
    """A row for a clean network like the teacher, and one for each trigger of these students, or, without any, of the
    teachers; columns for the teacher, for the student with data, and for the method and its defences."""
    teachers = [cell for cell in own if cell.backdoor and cell.kind == "poisoned" and cell.network == teacher]
    clean = [cell for cell in own if cell.kind == "normal" and cell.network == teacher]
    if clean:
        table.put(Place(CLEAN, TEACHER), max(clean, key=lambda cell: nearness(cell, teachers)))
    triggers = {cell.backdoor for cell in students or teachers}
    for cell in [*(cell for cell in teachers if cell.backdoor in triggers), *students]:
        table.put(Place(_row(cell.backdoor), TEACHER if cell.kind == "poisoned" else _way(cell.method)), cell)
    for trigger, row in published.items():
        for key, values in row.items():
            table.published[Place(_row(trigger), TEACHER if key == "teacher" else _way(key))] = tuple(values)
    places = [*table.cells, *table.published]
    table.rows = list(dict.fromkeys(row for row, _ in places))
    table.columns = sorted(dict.fromkeys(column for _, column in places), key=_order)
    return table


def _method(cell: Cell) -> str:
    return cell.method.partition(" ")[0]


def _row(trigger: str | None) -> Head:
    return Head((trigger or "",), trigger or "")


def _way(method: str) -> Head:
    return Head(tuple(method.split()), method_in_words(method))


def _order(column: Head) -> tuple[bool, bool, int]:
    """The teacher, the student with data, the method, the method with each defence."""
    defense = column.key[1] if len(column.key) > 1 else ""
    return (column != TEACHER, column.key != ("kd",),
            list(DEFENSES).index(defense) if defense in DEFENSES else len(DEFENSES))
