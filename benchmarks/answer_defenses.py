"""Answers per second of each answer defense on a CPU, and of ModelGuard-W solved as one linear program per answer.

    OMP_NUM_THREADS=1 python benchmarks/answer_defenses.py

SciPy's HiGHS (requirements-dev.txt) solves the linear program of the definition. Numbers are medians of several passes;
the defenses take turns, so the load of the machine affects all.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from defenses.answers import build_answer_defense
from defenses.perturbations import MARGIN
from reports.table import markdown

DEFENSES = ("stingy:2", "temperature:4", "random:0.5", "reverse_sigmoid:0.21", "mad:0.5", "modelguard_w:1",
            "modelguard_s:1")
LINEAR_PROGRAM = "linear program"


def linear_program(y: np.ndarray, epsilon: float = 1.0) -> Any:
    """Compute ModelGuard-W's answer to probabilities (C,) by its definition. Returns SciPy's OptimizeResult: `x` is the
    answer, then the slack variables d_c >= |y'_c - y_c|; `fun` is the cost; `status` is 0 if there is a solution."""
    count, top, identity = len(y), int(y.argmax()), np.eye(len(y))
    above = np.delete(identity - identity[top], top, axis=0)
    rows = np.block([[identity, -identity], [-identity, -identity], [above, np.zeros_like(above)],
                     [np.zeros((1, count)), np.ones((1, count))]])
    limits = np.concatenate([y, -y, np.full(count - 1, -MARGIN), [epsilon]])
    cost = np.concatenate([np.log(y + 1e-6), np.zeros(count)])
    total = np.concatenate([np.ones(count), np.zeros(count)])[None]
    return linprog(cost, rows, limits, total, [1.0], bounds=(0, None))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000], metavar="C")
    arguments = parser.parse_args()
    lines = [["answers per second", *(f"{classes} classes" for classes in arguments.classes)]]
    rates: dict[str, list[float]] = {name: [] for name in (*DEFENSES, LINEAR_PROGRAM)}
    for classes in arguments.classes:
        answers = torch.randn(1000, classes, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
        times: dict[str, list[float]] = {name: [] for name in rates}
        for _ in range(arguments.repeats + 1):
            for name in DEFENSES:
                times[name].append(seconds(partial(build_answer_defense(name), answers)) / len(answers))
            few = answers[:10 if classes <= 100 else 1]
            times[LINEAR_PROGRAM].append(seconds(partial(_programs, few)) / len(few))
        for name, found in times.items():
            rates[name].append(1 / statistics.median(found[1:]))  # without the warm-up
    lines += [[name, *(f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}" for rate in found)]
              for name, found in rates.items()]
    print(markdown(lines))


def _programs(answers: Tensor) -> None:
    for y in answers.double().numpy():
        linear_program(y)


if __name__ == "__main__":
    main()
