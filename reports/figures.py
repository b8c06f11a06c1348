"""Figures of a report: students by teacher and attack, tradeoffs, sweeps, and training curves."""
from __future__ import annotations

import itertools
import math
import re
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation

from reports.attacks import is_theft
from reports.cells import Cell, Collection, network_display_name, rank
from reports.plots import drawable, heat_map, legend, one_decimal, plt, save
from reports.sweeps import KEYS, Sweep
from reports.table import Header, Place, Table
from reports.tradeoffs import Point, Series, Tradeoff
from utils.errors import first_line

COLORS = {"no teacher": "0.6", "normal": "tab:blue", "continued": "tab:cyan", "poisoned": "tab:purple",
          "student": "tab:green", "unknown": "0.3"}
PROTECTED = "tab:red"  # trained-in defenses
STYLES = ("-", "--", ":", "-.")
plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "axes.grid.axis": "y", "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False})


def draw(tables: Sequence[Table], tradeoffs: Sequence[Tradeoff], sweeps: Sequence[Sweep],
         collections: Sequence[Collection], out: Path) -> tuple[list[Path], list[str]]:
    """Draw every table of students with finished runs, every tradeoff and sweep, and the curves of every collection.

    Returns the files, and a warning per figure that could not be drawn; the tables have the same numbers, so this is no
    error.
    """
    figures: list[tuple[str, Callable[[], plt.Figure]]] = [
        (table.name, partial({"bars": _bar_plot, "dots": _dot_plot, "heat": _heat_map_figure}[table.figure], table))
        for table in tables if table.finished and len(table.keys) == 1]
    figures += [(tradeoff.name, partial(_scatter_plot, tradeoff)) for tradeoff in tradeoffs]
    figures += [(sweep.name, partial(_line_plot, sweep)) for sweep in sweeps]
    for collection in collections:
        started = [cell for cell in collection.cells if not cell.ablation and not is_theft(cell)
                 and cell.kind != "smoothed" and any(run.history for run in cell.runs)]
        if started:
            figures.append((f"curves {collection.name}", partial(_training_curves, collection.title, started)))
    made, warnings = [], []
    for name, (_, figure) in zip(_file_names(name for name, _ in figures), figures, strict=True):
        file = out / f"{name}.png"
        try:
            save(figure(), file)
            made.append(file)
        except Exception as error:  # any failure of matplotlib
            plt.close("all")
            file.unlink(missing_ok=True)  # from an earlier report, or partly written
            warnings.append(f"{file} was not drawn: {first_line(error)}")
    return made, warnings


def _file_names(texts: Iterable[str]) -> list[str]:
    """Distinct file name for each text: lower-case ASCII, at most about 100 characters. Equal names are numbered; the
    end of a long name is replaced by a hash."""
    names: list[str] = []
    for text in texts:
        name = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")
        if len(name) > 100:
            name = f"{name[:91]}-{zlib.crc32(text.encode(errors='surrogatepass')):08x}"
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def _dot_plot(table: Table) -> plt.Figure:
    """Last epoch with standard deviation: one line per row, first row at the top, and one marker per column."""
    rows = [row for row in table.rows if any(table.is_finished(Place(row, column)) for column in table.columns)]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.3 * len(rows)))
    handles = []
    for number, (column, marker) in enumerate(zip(table.columns, itertools.cycle("os^Dvx"), strict=False)):
        offset = 0.12 * (number - (len(table.columns) - 1) / 2)  # draw markers of equal values side by side
        heights, means, deviations = [], [], []
        for height, row in enumerate(rows):
            if values := list(table.cells[Place(row, column)].values("last").values()) if table.is_finished(
                    Place(row, column)) else []:
                heights.append(height + offset)
                means.append(statistics.mean(values))
                deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        handles.append(axes.errorbar(means, heights, xerr=deviations, fmt=marker, capsize=2, markersize=6,
                                     color=_dot_color(column), markerfacecolor="none" if number else None)[0])
    axes.set_yticks(range(len(rows)), [drawable(row.label) for row in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("test accuracy of the student, last epoch, %")
    axes.set_title(drawable(table.title), fontsize=10, loc="left", wrap=True)
    legend(axes, handles, [column.label for column in table.columns], loc="upper center", ncols=2, fontsize=10,
           bbox_to_anchor=(0.4, -0.4 / (1 + 0.1 * len(rows))))
    return figure


def _heat_map_figure(table: Table) -> plt.Figure:
    """Heat map of the mean test accuracy at the last epoch."""
    means = [[_mean(table, Place(row, column)) for column in table.columns] for row in table.rows]
    return heat_map([row.label for row in table.rows], [column.label for column in table.columns], means,
                    f"{table.title}: test accuracy, last epoch, %")


def _mean(table: Table, place: Place) -> float:
    return statistics.mean(table.cells[place].values("last").values()) if table.is_finished(place) else math.nan


def _dot_color(column: Header) -> str:
    if column.key[0] != "teacher":
        return "0.5"
    kind = column.label.split()[0]
    return COLORS.get(kind, PROTECTED)


def _bar_plot(table: Table) -> plt.Figure:
    """Last epoch with standard deviation, and published value as a line: one group per column, one bar per row."""
    columns = [column for column in table.columns
               if any(place.column == column and cell.finished for place, cell in table.cells.items())]
    figure, axes = plt.subplots(figsize=(2 + 0.45 * len(columns) * (len(table.rows) + 1), 4.5))
    width = 0.85 / len(table.rows)
    ticks: list[float] = []  # centered on the existing bars
    for group, column in enumerate(columns):
        there = [number for number, row in enumerate(table.rows)
                 if table.is_finished(Place(row, column)) or Place(row, column) in table.published]
        ticks.append(group - 0.425 + (statistics.mean(there) + 0.5) * width)
    for number, (row, color) in enumerate(zip(table.rows, _colors(table.rows), strict=True)):
        lefts = {column: group - 0.425 + (number + 0.5) * width for group, column in enumerate(columns)}
        bars = {left: list(table.cells[Place(row, column)].values("last").values()) for column, left in lefts.items()
                if table.is_finished(Place(row, column))}
        if bars:
            means = [statistics.mean(values) for values in bars.values()]
            drawn = axes.bar(list(bars), means, width * 0.92,
                             yerr=[statistics.stdev(values) if len(values) > 1 else 0 for values in bars.values()],
                             color=color, label=row.label, error_kw={"elinewidth": 1.2, "capsize": 3})
            axes.bar_label(drawn, [one_decimal(mean) for mean in means], padding=2, fontsize=9)
        published_values = [(left, table.published[Place(row, column)][0]) for column, left in lefts.items()
                  if Place(row, column) in table.published]
        if published_values:
            axes.hlines([value for _, value in published_values], [left - width / 2 for left, _ in published_values],
                        [left + width / 2 for left, _ in published_values], color="black", lw=2)
    handles, words = axes.get_legend_handles_labels()
    if table.published:
        handles.append(plt.Line2D([], [], color="black", lw=2))
        words.append("paper, unchecked")
    axes.set_xticks(ticks, [drawable(column.label).replace(", ", ",\n") for column in columns])
    axes.set(ylabel="test accuracy, last epoch, %", ylim=(0, 105), xlim=(-0.5, len(columns) - 0.5))
    axes.set_title(drawable(table.title), pad=14)
    legend(axes, handles, words, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _colors(rows: Sequence[Header]) -> list[tuple[float, float, float]]:
    """RGB color of each row, by the kind of the teacher; further rows of a kind get lighter shades."""
    kinds = [row.key[1] if len(row.key) > 1 else row.label for row in rows]
    colors = []
    for number, kind in enumerate(kinds):
        share = kinds[:number].count(kind) / kinds.count(kind)  # fraction of white
        red, green, blue = (part + (1 - part) * 0.8 * share for part in to_rgb(_color(kind)))
        colors.append((red, green, blue))
    return colors


def _color(kind: str) -> str:
    return COLORS.get(kind, PROTECTED)


def _line_plot(sweep: Sweep) -> plt.Figure:
    """Test accuracy at the last epoch against the parameter, with the standard deviation over seeds."""
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    kinds: list[str] = []
    for line_label, line in sweep.lines.items():
        kind = line[0][1].teacher_kind or "no teacher"
        style = STYLES[kinds.count(kind) % len(STYLES)]  # distinguishes lines of one kind, which share a color
        kinds.append(kind)
        values = [list(cell.values("last").values()) for _, cell in line]
        axes.errorbar([x for x, _ in line], [statistics.mean(value) for value in values],
                      [statistics.stdev(value) if len(value) > 1 else 0 for value in values], marker="o", capsize=3,
                      color=_color(kind), linestyle=style, label=sweep.label(line_label))
    axes.set(xlabel=KEYS[sweep.key], ylabel="test accuracy, last epoch, %")
    ticks = sorted({x for line in sweep.lines.values() for x, _ in line})
    if sweep.key == "query_budget":
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_title(drawable(f"{network_display_name(sweep.network)}, {sweep.where}"), fontsize=12)
    if len(sweep.lines) > 2:  # below the lines
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)
    else:
        axes.legend()
    return figure


MARKERS = "oD^vsPX<>p"  # distinct in grayscale; filled: trained-in defenses, hollow: answer defenses
REFERENCE_STYLES = ("--", ":", "-.")
MIN_RANGE = 2  # of an axis, percentage points, so that a few images do not look like a large difference


@dataclass(frozen=True)
class _Mark:
    """Position of a tradeoff's point: its means, and an offset to the right in points (1/72 inch)."""

    point: Point
    x: float
    y: float
    right: float


def _scatter_plot(tradeoff: Tradeoff) -> plt.Figure:
    """Accuracy of the strongest attack's student against accuracy of the teacher: one marker per series, one point per
    teacher with the strength of its defense beside it. Points of equal values are drawn side by side."""
    figure, axes = plt.subplots(figsize=(7, 5.5))
    handles: list[Artist] = []
    words = []
    markers = {answers: itertools.cycle(MARKERS) for answers in (False, True)}
    marks = _marks(tradeoff.series)
    axes.margins(x=0.08 + max(mark.right for mark in marks.values()) / 400, y=0.08)
    for number, series in enumerate(tradeoff.series):
        color, marker, size = ("black", "*", 17) if series.unprotected else (
            f"C{number % 10}", next(markers[series.answers]), 9)
        own = [marks[id(point)] for point in series.points]
        errors = [[statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracies] for accuracies in (
            [mark.point.teacher for mark in own], [mark.point.verdict.student for mark in own])]
        axes.errorbar([mark.x for mark in own], [mark.y for mark in own], xerr=errors[0], yerr=errors[1], color=color,
                      elinewidth=0.8, linewidth=1.5, zorder=2)
        for mark in own:
            beside = axes.transData + ScaledTranslation(mark.right / 72, 0, figure.dpi_scale_trans)
            handle, = axes.plot(mark.x, mark.y, marker, color=color, markersize=size, markeredgewidth=1.6, zorder=3,
                                markerfacecolor="white" if series.answers else color, transform=beside, clip_on=False)
        handles.append(handle)
        words.append(series.title)
    for (name, values), style in zip(tradeoff.references.items(), REFERENCE_STYLES, strict=False):
        handles.append(axes.axhline(statistics.mean(values), color="0.35", linestyle=style, zorder=1))
        words.append(f"student of {name}")
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        lacking = max(MIN_RANGE - (limits[1] - limits[0]), 0) / 2
        set_limits(limits[0] - lacking, limits[1] + lacking)
    axes.grid(axis="both", alpha=0.3)
    axes.set(xlabel="test accuracy of the teacher's answers to clients, %",
             ylabel="test accuracy of the strongest attack's student, %")
    hint = "Better defenses are further right and down." + (
        " Points of equal values are drawn side by side." * any(mark.right for mark in marks.values()))
    axes.set_title(f"{drawable(tradeoff.title)}\n{hint}", fontsize=10, loc="left", wrap=True)
    legend(axes, handles, words, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=10)
    _write_strengths(axes, list(marks.values()), [marks[id(point)] for series in tradeoff.series
                                                  if len(series.points) > 1 for point in series.points])
    return figure


def _marks(series: Sequence[Series]) -> dict[int, _Mark]:
    """Mark of each point, by `id(point)`."""
    places: dict[tuple[float, float], list[Point]] = {}
    for point in (point for each in series for point in each.points):
        place = statistics.mean(point.teacher), statistics.mean(point.verdict.student)
        places.setdefault((round(place[0], 2), round(place[1], 2)), []).append(point)
    return {id(point): _Mark(point, x, y, 12 * (number - (len(points) - 1) / 2))
            for (x, y), points in places.items() for number, point in enumerate(points)}


def _write_strengths(axes: plt.Axes, marks: Sequence[_Mark], written: Sequence[_Mark]) -> None:
    """Write the strength beside marks, where it overlaps other marks and texts least."""
    size, gap = 9, 7  # font size, and distance from the mark; all distances here are in points (1/72 inch)
    scale = 72 / axes.figure.dpi

    def center(mark: _Mark) -> tuple[float, float]:
        across, up = axes.transData.transform((mark.x, mark.y)) * scale
        return across + mark.right, up

    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in map(center, marks)]
    for mark in (mark for mark in written if mark.point.strength is not None):
        text, (x, y) = f"{mark.point.strength:g}", center(mark)
        width = 0.62 * size * len(text)
        boxes = []
        for across, up in ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1.5), (0, -1.5), (0, 2.5),
                           (0, -2.5)):
            left, bottom = x + across * gap - width * (1 - across) / 2, y + up * gap - size / 2
            boxes.append((left, bottom, left + width, bottom + size))
        box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        axes.annotate(text, (mark.x, mark.y), (box[0] - x + mark.right, box[1] - y), textcoords="offset points",
                      fontsize=size, zorder=4, path_effects=[withStroke(linewidth=2.5, foreground="white")])


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _overlap(one: Box, other: Box) -> float:
    """Area of the intersection of two boxes."""
    width, height = (min(one[end], other[end]) - max(one[start], other[start]) for start, end in ((0, 2), (1, 3)))
    return max(width, 0.0) * max(height, 0.0)


def _training_curves(title: str, cells: Sequence[Cell]) -> plt.Figure:
    """Test accuracy by epoch, mean over seeds: one plot per kind of run, one line per cell."""
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.kind == "student", rank(cell.teacher_kind or cell.kind))):
        what = f"students of {cell.teacher_kind} teachers" if cell.kind == "student" else \
            "from labels" if cell.kind == "normal" else f"{cell.kind} teachers"
        groups.setdefault(what, []).append(cell)
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    figure, axes = plt.subplots(-(-len(groups) // columns), columns, sharey=True, squeeze=False,
                                figsize=(5.6 * columns, 4.4 * -(-len(groups) // columns)))
    for plot in axes.flat[len(groups):]:
        plot.axis("off")
    for plot, (what, members) in zip(axes.flat, groups.items(), strict=False):
        for cell in members:
            started = [run for run in cell.runs if run.history]
            histories = [run.history for run in [run for run in started if run.finished] or started]
            epochs = min(map(len, histories))
            means = [statistics.mean(history[epoch]["test_accuracy"] for history in histories)
                     for epoch in range(epochs)]
            plot.plot(range(1, epochs + 1), means, marker="." if epochs < 30 else None)
        plot.set(title=what, xlabel="epoch")
        plot.xaxis.get_major_locator().set_params(integer=True)
        legend(plot, plot.get_lines(), ["/".join(cell.experiment.parts[-2:]) for cell in members],
               fontsize=9 if len(members) <= 12 else 6)
    for plot in axes[:, 0]:
        plot.set_ylabel("test accuracy, %")
    figure.suptitle(drawable(title))
    figure.tight_layout()
    return figure
