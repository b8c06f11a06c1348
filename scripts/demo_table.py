"""The demo's table from its results: mean over seeds and, with several, the standard deviation.

    python scripts/demo_table.py experiments/demo [experiments/demo-seed1 ...]
"""
from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

TEACHER, NASTY = "baseline/net24", "kd_nasty_net24/nasty_net24"
ROWS = [("teacher", "normal", TEACHER, None), ("teacher", "nasty", NASTY, TEACHER)]
for width in ("net16", "net8"):
    ROWS += [(width, "no teacher", f"baseline/{width}", None),
             (width, "of the normal teacher", f"kd_normal_net24/{width}", f"baseline/{width}"),
             (width, "of the nasty teacher", f"kd_nasty_net24/{width}", f"baseline/{width}")]


def main() -> None:
    seeds = [{str(path.parent.relative_to(root)): json.loads(path.read_text()) for path in root.rglob("results.json")}
             for root in map(Path, sys.argv[1:])]
    count = f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    print(f"\nTest accuracy in percent on 2,000 images of Fashion-MNIST, {count}; teachers: net, 24 channels.")
    print(f"\n| {'network':8} | {'trained':21} | {'last epoch':13} | {'difference':13} | {'best epoch':13} |")
    print(f"|{'-' * 10}|{'-' * 23}|{'-' * 15}|{'-' * 15}|{'-' * 15}|")
    for network, how, name, reference in ROWS:
        last, best = ([seed[name][epoch]["test_accuracy"] for seed in seeds] for epoch in ("last", "best"))
        difference = ""
        if reference:
            compared = [seed[reference]["last"]["test_accuracy"] for seed in seeds]
            difference = spread([a - b for a, b in zip(last, compared, strict=True)], "+")
        print(f"| {network:8} | {how:21} | {spread(last):13} | {difference:13} | {spread(best):13} |")
    print("\nDifference: the nasty teacher to the normal one, a student to the same network without a teacher, at the "
          "last epoch.\nBest epoch: highest accuracy on these same test images, so it flatters.")


def spread(values: list[float], sign: str = "") -> str:
    """`mean`, or `mean ± standard deviation` of several."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
