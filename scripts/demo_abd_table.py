"""The table of the backdoor demo from its results: one teacher, or mean and standard deviation over several.

    python scripts/demo_abd_table.py experiments/demo/abd [experiments/demo/abd-seed1 ...]
"""
from __future__ import annotations

import json
from pathlib import Path

from demo_table import markdown, show, spread

ROWS = (("clean", "a clean network"), ("teacher", "poisoned teacher"), ("kd", "its student with a fifth of the data"),
        ("ood", "its student without data"), ("ood_abd", "the same with ABD's vaccine"))
COLUMNS = {"accuracy": "test_accuracy", "ASR": "asr", "base rate": "base_rate", "target recall": "target_recall"}


def table(roots: list[Path]) -> str:
    """A Markdown table of the results below each directory, one directory a seed. OSError where one is missing."""
    lines = [("network", *COLUMNS)]
    for name, what in ROWS:
        rows = [json.loads((root / name / "results.json").read_text())["last"] for root in roots]
        cells = [spread([row[key] for row in rows]) if key in rows[0] else "" for key in COLUMNS.values()]
        lines.append((what, *cells))
    return markdown(lines)


if __name__ == "__main__":
    show(table, "Percent of 2,000 test images of Fashion-MNIST at the last epoch",
         "ASR: images of other classes that are taken for the target (class 0) once the trigger is on them. Base\n"
         "rate: the same images without the trigger that are taken for it all the same. Target recall: images of the\n"
         "target that are recognised.")
