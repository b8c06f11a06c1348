"""The papers' tables, with measured values above the published ones (published.json)."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.attacks import attacks, is_theft
from reports.backdoors import backdoors
from reports.cells import Collection, has_started
from reports.students import fill
from reports.table import Table

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def tables(collections: Sequence[Collection]) -> list[Table]:
    """All tables with cells; ablations are left out."""
    return [table for collection in collections for table in _tables(collection) if table.cells]


def _tables(collection: Collection) -> list[Table]:
    own = [cell for cell in collection.cells if not cell.ablation]
    of_backdoors = backdoors(collection, own, PUBLISHED["backdoors"].get(collection.dataset, {}))
    placed = {cell.experiment for table in of_backdoors for cell in table.cells.values()}
    # A clean network of a backdoor table may be the teacher of other students.
    teachers_of_others = {cell.source for cell in own if cell.kind == "student" and cell.experiment not in placed}
    own = [cell for cell in own if cell.experiment not in placed - teachers_of_others]
    of_attacks = [table for table in attacks(collection, own) if table.cells]
    if of_attacks:
        own = [cell for cell in own if not is_theft(cell) and cell.kind != "smoothed"]
    students = [cell for cell in own if cell.kind == "student"]
    with_data = [cell for cell in students if cell.description.uses_data]
    without = [cell for cell in students if not cell.description.uses_data]
    published = PUBLISHED["datafree"].get(collection.dataset, {})
    if not published.keys() & {cell.teacher for cell in without} and not any(map(has_started, without)):
        without = []
    sources, data_free_sources = {cell.source for cell in with_data}, {cell.source for cell in without}
    teachers = [cell for cell in own if cell.kind not in ("normal", "student")]
    normal = [cell for cell in own if cell.kind == "normal"]
    made = []
    networks = normal + [cell for cell in teachers if cell.experiment not in data_free_sources - sources]
    if with_data or (networks and not without):
        table = fill(Table(f"students {collection.name}", f"Students with data, {collection.title}"), with_data,
                     networks, PUBLISHED["students"].get(collection.dataset, {}))
        shown = {cell.experiment for each in of_attacks for cell in each.cells.values()}
        repeated = all(cell.kind == "normal" and cell.experiment in shown for cell in networks)
        if with_data or table.published or not repeated:  # otherwise the tables of attacks show all of it
            made.append(table)
    if without:
        networks = normal + [cell for cell in teachers if cell.experiment in data_free_sources]
        table = Table(f"datafree {collection.name}", f"Students without data, {collection.title}")
        made.append(fill(table, without, networks, published))
    return made + of_attacks + of_backdoors
