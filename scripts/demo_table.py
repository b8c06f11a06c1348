"""The demo's table from its results: one seed, or mean and standard deviation over several.

    python scripts/demo_table.py experiments/demo [experiments/demo-seed1 ...]
"""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

NORMAL, NASTY = "baseline/net16", "kd_nasty_net16/nasty_net16"
# network, how it was trained, directory, the same network without a teacher, the one of the normal teacher
ROWS = [("net16", "normal teacher", NORMAL, None, None), ("net16", "nasty teacher", NASTY, None, NORMAL)]
for width in ("net16", "net8"):
    alone, normal, nasty = f"baseline/{width}", f"kd_normal_net16/{width}", f"kd_nasty_net16/{width}"
    ROWS += [(width, "no teacher", alone, None, None)] if alone != NORMAL else []
    ROWS += [(width, "by the normal teacher", normal, alone, None),
             (width, "by the nasty teacher", nasty, alone, normal)]


def table(roots: list[Path]) -> str:
    """A Markdown table of the results below each directory, one directory a seed. OSError where one is missing."""
    lines = [("network", "trained", "last epoch", "to no teacher", "to normal", "best epoch")]
    lines += [(network, how, spread(accuracy(roots, name)), difference(roots, name, alone),
               difference(roots, name, normal), spread(accuracy(roots, name, "best")))
              for network, how, name, alone, normal in ROWS]
    return markdown(lines)


def accuracy(roots: list[Path], name: str, epoch: str = "last") -> list[float]:
    """Of one experiment below each directory, at its `last` or its `best` epoch."""
    return [json.loads((root / name / "results.json").read_text())[epoch]["test_accuracy"] for root in roots]


def difference(roots: list[Path], name: str, other: str | None) -> str:
    """How much more one experiment has than another at the last epoch, seed by seed; nothing without another."""
    if not other:
        return ""
    return spread([a - b for a, b in zip(accuracy(roots, name), accuracy(roots, other), strict=True)], "+")


def markdown(lines: list[tuple[str, ...]]) -> str:
    """A table, the first line its heads."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def spread(values: list[float], sign: str = "") -> str:
    """`mean`, or `mean ± standard deviation` of several."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def show(table: Callable[[list[Path]], str], title: str, legend: str) -> None:
    """Print a table of the results below the directories of the command line, one directory a seed."""
    directories = [Path(word) for word in sys.argv[1:]]
    seeds = f"mean ± standard deviation of {len(directories)} seeds" if len(directories) > 1 else "one seed"
    try:
        text = table(directories)
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} does not exist: that experiment is not finished")
    print(f"\n{title}, {seeds}.\n\n{text}\n\n{legend}")


if __name__ == "__main__":
    show(table, "Test accuracy in percent on 2,000 images of Fashion-MNIST",
         "net16, net8: `net` with 16 and 8 channels. To no teacher, to normal: the difference to the same network\n"
         "trained without a teacher, and by (or as) the normal teacher, at the last epoch. Best epoch: the highest\n"
         "accuracy on these same images, so it flatters.")
