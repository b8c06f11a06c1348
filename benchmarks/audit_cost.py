"""Cost of an audit, relative to training one student, for several grids.

    python benchmarks/audit_cost.py                 # the demo: a normal teacher net16, thieves with 1,000 images

One student is a process `train_scratch.py` with the same images and number of epochs. An audit is the whole of
`audit.py`: it evaluates the model, trains its students, `--jobs` at a time, and writes its result. The table shows the
number of students, the seconds, and the ratio to one student.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NET = {"dataset": "demo", "model_name": "net", "num_channels": 16, "learning_rate": 0.001, "batch_size": 128,
       "augmentation": 0}
FOUR: dict[str, Any] = {"attacks": [{"attack": "kd", "temperature": 1}, {"attack": "kd", "temperature": 4},
                                    {"attack": "kd", "temperature": 20}, "hard_label"]}
ONE: dict[str, Any] = {"attacks": ["hard_label"]}
UNLABELED: dict[str, Any] = {"thieves": ["unlabeled"]}
GRIDS: dict[str, dict[str, Any]] = {
    "core": {},
    "4 attacks, unlabeled": {**FOUR, **UNLABELED},
    "4 attacks, unlabeled, 3 seeds": {**FOUR, **UNLABELED, "seeds": [0, 1, 2]},
    "4 attacks, unlabeled, 300 and 1,000 images": {**FOUR, **UNLABELED, "query_budgets": [300, 1000]},
    "1 attack, unlabeled": {**ONE, **UNLABELED}}


def seconds(script: str, directory: Path, params: dict[str, Any], data_dir: Path, *arguments: str) -> float:
    """Run a script and return its wall time in seconds."""
    directory.mkdir(parents=True)
    (directory / "params.json").write_text(json.dumps(NET | params))
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), "--save_path", str(directory), "--data_dir", str(data_dir),
                    *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of the single student (default: 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="students at a time (default: one per core)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        seconds("train_scratch.py", root / "teacher", {"num_epochs": 4, "schedule": [3]}, root)
        student = {"subset_size": 1000, "num_epochs": 20, "schedule": [15], "batch_size": 125}
        one = statistics.median(seconds("train_scratch.py", root / f"student{repeat}", student, root)
                                for repeat in range(arguments.repeats))
        audit = {"num_epochs": 4, "schedule": [3], "query_budgets": [1000], "checkpoint": str(root / "teacher")}
        print(f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, {arguments.jobs} students at a time\n")
        print("| run | students | seconds | times one student |\n|---|---|---|---|")
        print(f"| one student | 1 | {one:.1f} | 1.0 |")
        for number, (name, grid) in enumerate(GRIDS.items()):
            directory = root / f"audit{number}"
            took = seconds("audit.py", directory, audit | grid, root, "--jobs", str(arguments.jobs))
            students = len(list(directory.rglob("results.json")))
            print(f"| {name} | {students} | {took:.1f} | {took / one:.1f} |", flush=True)


if __name__ == "__main__":
    main()
