"""The table of demo_theft.sh from its results.

    python scripts/demo_theft_table.py experiments/demo [experiments/demo-seed1 ...]
"""
from __future__ import annotations

from pathlib import Path

from demo_table import NASTY, NORMAL, accuracy, difference, markdown, show, spread

# what it is, directory, its teacher's
ROWS = [("normal teacher", NORMAL, None),
        ("its student without data", "kd_normal_net16/deepinversion_net16", NORMAL),
        ("nasty teacher", NASTY, None),
        ("its student without data", "kd_nasty_net16/deepinversion_net16", NASTY)]


def table(roots: list[Path]) -> str:
    """A Markdown table of the results below each directory, one directory a seed. OSError where one is missing."""
    lines = [("network", "last epoch", "to its teacher", "best epoch")]
    lines += [(what, spread(accuracy(roots, name)), difference(roots, name, teacher),
               spread(accuracy(roots, name, "best"))) for what, name, teacher in ROWS]
    return markdown(lines)


if __name__ == "__main__":
    show(table, "Test accuracy in percent on 2,000 images of Fashion-MNIST (guessing: 10)",
         "All of them are `net` with 16 channels. The students have seen no image of the data set, only what\n"
         "DeepInversion made from their teacher. To its teacher: the difference at the last epoch. Best epoch: the\n"
         "highest accuracy on the test images, so it flatters.")
