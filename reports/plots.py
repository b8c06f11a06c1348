"""Matplotlib setup of all figures: files instead of windows, and names drawn literally.

Class and folder names come from users, and matplotlib interprets two things in a text: `$...$` as a formula, and a
leading underscore as "not in the legend".
"""
from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.artist import Artist

plt.rcParams["text.parse_math"] = False
SPAN = 10.0  # range of gray shades in a heat map, percentage points


def drawable(text: str) -> str:
    """Escape bytes of a file name that are not UTF-8, so that a font can draw the text: `\\udcb9`."""
    return text.encode(errors="backslashreplace").decode()


def one_decimal(value: float) -> str:
    """Number with one decimal; halves such as 84.25, which floats hold inexactly, are rounded up."""
    return f"{value + 1e-9:.1f}"


def legend(where: plt.Axes | plt.Figure, handles: Sequence[Artist], labels: Sequence[str], **options: Any) -> None:
    """Draw a legend with labels of any text. options: keyword arguments of matplotlib's `legend`."""
    drawn = where.legend(handles, [str(number) for number in range(len(labels))], **options)
    for text, label in zip(drawn.get_texts(), labels, strict=True):
        text.set_text(drawable(label))


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]],
             title: str, *, bold: Collection[int] = ()) -> plt.Figure:
    """Heat map with each value as a number; NaN: an empty cell. Higher is darker; values `SPAN` or more below the
    highest are white. bold: indices of the columns whose largest value is bold."""
    figure, axes = plt.subplots(figsize=(3 + 0.75 * len(columns), 1.5 + 0.3 * len(rows)))
    highest = max(value for line in values for value in line if not math.isnan(value))
    axes.imshow(values, cmap="Greys", aspect="auto", vmin=highest - SPAN, vmax=highest + SPAN)
    largest = [max((value for value in column if not math.isnan(value)), default=0.0)
               for column in zip(*values, strict=True)]
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, one_decimal(value), ha="center", va="center", fontsize=9,
                          fontweight="bold" if x in bold and value == largest[x] else "normal")
    axes.set_xticks(range(len(columns)), [drawable(column) for column in columns], rotation=40, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), [drawable(row) for row in rows], fontsize=9)
    axes.grid(visible=False)
    axes.set_title(f"{drawable(title)}\ndarker is higher; white: {SPAN:g} or more below the highest", fontsize=10,
                   loc="left", wrap=True)
    return figure


def save(figure: plt.Figure, file: Path) -> None:
    """Write a figure as a PNG, and close it even if writing fails."""
    try:
        figure.savefig(file, dpi=110, bbox_inches="tight")
    finally:
        plt.close(figure)
