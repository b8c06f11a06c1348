"""Table of cells by row and column: last and best epoch, differences, and published values below them."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from reports.cells import Cell, has_started, mean_std

EPOCHS = {"last": "last epoch", "best": "best epoch"}


class Header(NamedTuple):
    """Header of a row or column: `key` identifies its contents, `label` is displayed."""

    key: tuple[str, ...]
    label: str


class Place(NamedTuple):
    row: Header
    column: Header


TEACHER = Header(("teacher",), "teacher")  # column of the teachers themselves


@dataclass
class Table:
    """Cells by row and column, and the published values."""

    name: str  # for files
    title: str
    keys: tuple[str, ...] = ("test_accuracy",)  # metrics in a cell
    more: tuple[str, ...] = ()  # metrics on a line below, at the last epoch
    detail_rows: dict[str, str] = field(default_factory=dict)  # lines below, label by entry of results.json's details
    rows: list[Header] = field(default_factory=list)
    columns: list[Header] = field(default_factory=list)
    cells: dict[Place, Cell] = field(default_factory=dict)
    published: dict[Place, tuple[float, ...]] = field(default_factory=dict)
    references: dict[Place, list[Place]] = field(default_factory=dict)  # the first existing one is subtracted
    published_references: dict[Place, list[Place]] = field(default_factory=dict)  # the first one is subtracted
    notes: list[str] = field(default_factory=list)  # sentences below the table
    summary: list[list[str]] = field(default_factory=list)  # smaller table below the notes
    figure: str = "bars"  # or "dots", for many rows, or "heat", for many rows and columns
    epochs: tuple[str, ...] = tuple(EPOCHS)  # epochs shown; results.csv has both

    @property
    def finished(self) -> bool:
        return any(cell.finished for cell in self.cells.values())

    def is_finished(self, place: Place) -> bool:
        """True if a cell exists and has finished runs."""
        return place in self.cells and bool(self.cells[place].finished)

    def leave_out_idle(self, references: Collection[Header] = ()) -> None:
        """Remove rows and columns in which no run has started and the paper has no value.

        references: rows that are shown in every column, so that they do not count for columns.
        """
        started = {place for place, cell in self.cells.items() if has_started(cell)} | self.published.keys()
        columns = {column for row, column in started if row not in references}
        rows = {row for row, column in started if column in columns}
        self.rows = [row for row in self.rows if row in rows]
        self.columns = [column for column in self.columns if column in columns]
        self.cells = {place: cell for place, cell in self.cells.items()
                      if place.row in rows and place.column in columns}

    def put(self, place: Place, cell: Cell) -> Place:
        """Add a cell. Returns its place: if the given one is taken, a new column named by the cell's directory."""
        key, label = place.column
        for name in (cell.experiment.name, str(cell.experiment)):
            if self.cells.get(place, cell) is not cell:
                place = Place(place.row, Header((*key, name), f"{label}, {name}"))
        self.cells[place] = cell
        return place

    def transposed(self) -> Table:
        """The table with rows and columns exchanged."""
        def swap(place: Place) -> Place:
            return Place(place.column, place.row)

        return replace(self, rows=self.columns, columns=self.rows,
                       cells={swap(place): cell for place, cell in self.cells.items()},
                       published={swap(place): values for place, values in self.published.items()},
                       references={swap(place): [swap(other) for other in others]
                                   for place, others in self.references.items()},
                       published_references={swap(place): [swap(other) for other in others]
                                          for place, others in self.published_references.items()})

    def lines(self) -> list[list[str]]:
        """Header, then a few lines per row: name of the values, and one text per column."""
        lines = [["", "", *(column.label for column in self.columns)]]
        for row in self.rows:
            places = [Place(row, column) for column in self.columns]
            block = [[EPOCHS[epoch], *(self._measured(place, epoch) for place in places)] for epoch in self.epochs]
            block += [[label, *(self._rates(place, entry, self.keys) for place in places)]
                      for entry, label in self.detail_rows.items()]
            block += [[" / ".join(key.replace("_", " ") for key in self.more),
                       *(self._rates(place, "last", self.more) for place in places)],
                      ["paper, unchecked", *(self._published_value(place) for place in places)]]
            shown = [line for line in block if any(line[1:])]
            lines += [[row.label if line is shown[0] else "", *line] for line in shown]
        return lines

    def _measured(self, place: Place, epoch: str) -> str:
        cell = self.cells.get(place)
        if cell is None:
            return ""
        if not cell.finished:
            done = max(len(run.history) for run in cell.runs)
            return f"epoch {done}" if done and epoch == "last" else "–" if epoch == "last" else ""
        return self._rates(place, epoch, self.keys) + _missing(cell) + self._difference(place, epoch)

    def _rates(self, place: Place, source: str, keys: Sequence[str]) -> str:
        """Metrics of a cell. source: see `Cell.values`."""
        cell = self.cells.get(place)
        if cell is None:
            return ""
        rates = [mean_std(values.values()) if (values := cell.values(source, key)) else "" for key in keys]
        if any(rates) and cell.backdoor:  # undefined if the test images lack the required class
            rates = [rate or "n/a" for rate in rates]
        return " / ".join(filter(None, rates))

    def _difference(self, place: Place, epoch: str) -> str:
        """Difference to the reference, over the seeds that both have."""
        other = next((self.cells[other] for other in self.references.get(place, ()) if other in self.cells), None)
        if other is None:
            return ""
        values, base = self.cells[place].values(epoch), other.values(epoch)
        differences = [values[seed] - base[seed] for seed in values if seed in base]
        if not differences:
            return ""
        of = "" if len(differences) == len(values) else f", {len(differences)} of {len(values)} seeds"
        return f" ({mean_std(differences, '+')}{of})"

    def _published_value(self, place: Place) -> str:
        values = self.published.get(place)
        if not values:
            return ""
        places = self.published_references.get(place, ())
        base = next((self.published[other] for other in places if other in self.published), None)
        less = f" ({values[0] - base[0]:+.2f})" if base else ""
        return " / ".join(f"{value:g}" if len(self.keys) > 1 else f"{value:.2f}" for value in values) + less


def format_table(table: Table) -> list[str]:
    """Table, notes and summary, as blocks of Markdown."""
    blocks = [markdown(table.lines())]
    if table.notes:
        blocks.append("\n".join(table.notes))
    if table.summary:
        blocks.append(markdown(table.summary))
    return blocks


def _missing(cell: Cell) -> str:
    return "" if len(cell.finished) == len(cell.runs) else f", {len(cell.finished)} of {len(cell.runs)} seeds"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Markdown table; the first line is the header."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
