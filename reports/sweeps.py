"""Sweeps: runs that differ in only one parameter. Accuracy of students against `weight`, `temperature`, `alpha` or the
fraction of the training data, as in the figures of the Nasty Teacher paper."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from reports.attacks import row_labels
from reports.cells import Cell, Collection, mean_std, network_display_name, student_method_name

# Swept parameters and their display names; `weight` is read from a student's teacher (trained-in defense).
KEYS = {"weight": "weight of the teacher's defense", "temperature": "temperature of the student",
        "alpha": "weight alpha of the student's KL term", "subset_fraction": "fraction of the training images",
        "query_budget": "number of images sent to the teacher"}
LENGTH = ("num_epochs", "batch_size", "schedule")  # training length, which depends on the number of images
MIN_VALUES = 3  # minimum number of values in a sweep
Line = list[tuple[float, Cell]]  # (value, cell), sorted


@dataclass
class Sweep:
    """One figure, with one line per kind of teacher (or `no teacher`) and non-default interface or attack, such as
    `nasty` or `nasty teacher, answers label, DKD`."""

    name: str  # for files
    where: str  # the collection
    key: str
    network: str
    lines: dict[str, Line] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{network_display_name(self.network)} against the {KEYS[self.key]}, {self.where}, last epoch"

    @staticmethod
    def label(line_label: str) -> str:
        """Display name of a line."""
        return line_label if "teacher" in line_label else f"{line_label} teacher"

    def table(self) -> list[list[str]]:
        """Header, then accuracies at the last epoch: one row per line, one column per value."""
        values = sorted({value for line in self.lines.values() for value, _ in line})
        table = [["", *(f"{value:g}" for value in values)]]
        for line_label, line in self.lines.items():
            texts = {value: mean_std(cell.values("last").values()) for value, cell in line}
            table.append([self.label(line_label), *(texts.get(value, "") for value in values)])
        return table


def sweeps(collections: Sequence[Collection]) -> list[Sweep]:
    """All sweeps of the finished cells."""
    return [sweep for collection in collections for sweep in _sweeps(collection)]


def _sweeps(collection: Collection) -> list[Sweep]:
    finished = [cell for cell in collection.cells if cell.finished]
    by_experiment = {cell.experiment: cell for cell in collection.cells}
    groups: dict[tuple[str, str, str, Hashable, Hashable], dict[float, Cell]] = {}
    for key in KEYS:
        words = row_labels([cell for cell in finished if cell.params.get(key) is not None], without=key)
        for cell in finished:
            source = by_experiment.get(cell.source) if cell.source else None
            holder = source if key == "weight" else cell
            if holder is None or holder.params.get(key) is None or not cell.description.uses_data or \
                    (cell.kind != "student" and (key != "subset_fraction" or cell.kind != "normal")):
                continue
            line_label = cell.teacher_kind or "no teacher"
            others = [f"answers {cell.answers}"] * bool(cell.answers)
            others += [student_method_name(cell.student_method)] * bool(cell.student_method)
            if key == "query_budget":
                others = [words[cell.experiment]]
            if others := [*others, *["no labels"] * (not cell.description.labels)]:
                line_label = ", ".join([Sweep.label(line_label), *others])
            what = (key, cell.network, line_label, _other_settings(cell, key),
                    _other_settings(source, key) if source and key == "weight" else cell.source)
            groups.setdefault(what, {})[holder.params[key]] = cell
    found: dict[tuple[Hashable, ...], Sweep] = {}
    for (key, network, line_label, *_), values in groups.items():
        if len(values) >= MIN_VALUES:
            sweep = found.setdefault((key, network), Sweep(f"{key} {collection.name} {network}", collection.title,
                                                           key, network))
            line = sorted(values.items())
            if len(line) > len(sweep.lines.get(line_label, [])):  # keep the longest
                sweep.lines[line_label] = line
    return list(found.values())


def _other_settings(cell: Cell, key: str) -> Hashable:
    """All other parameters that affect a result."""
    left_out = {key, "seed", "teacher_resume", "adversarial_resume", "init_from", "num_workers", "cuda", "cuda_graph",
                "compile", "teacher_cache", *(LENGTH if key == "query_budget" else ())}
    return tuple(sorted((name, str(value)) for name, value in cell.params.items() if name not in left_out))
