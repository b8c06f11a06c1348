"""The table of demo_theft.sh from its results.

    python scripts/demo_theft_table.py experiments/demo [experiments/demo-seed1 ...]
"""
from __future__ import annotations

import json
from pathlib import Path

from demo_table import NASTY, NORMAL, markdown, show, spread

ROWS = [("normal teacher", NORMAL), ("its student without data", "kd_normal_net16/deepinversion_net16"),
        ("nasty teacher", NASTY), ("its student without data", "kd_nasty_net16/deepinversion_net16")]


def table(roots: list[Path]) -> str:
    """A Markdown table of the results below each directory, one directory a seed. OSError where one is missing."""
    lines = [("network", "last epoch", "best epoch")]
    for what, name in ROWS:
        results = [json.loads((root / name / "results.json").read_text()) for root in roots]
        lines.append((what, *(spread([result[epoch]["test_accuracy"] for result in results])
                              for epoch in ("last", "best"))))
    return markdown(lines)


if __name__ == "__main__":
    show(table, "Test accuracy in percent on 2,000 images of Fashion-MNIST",
         "All of them are `net` with 16 channels. Best epoch: the highest accuracy on these\n"
         "same images, so it flatters.")
