"""Cost of an attack that queries the teacher once, relative to training the same student on labels.

    python benchmarks/queried_once.py                 # the demo: a normal teacher net16, students net16
    python benchmarks/queried_once.py --repeats 7

The first attack on a teacher sends every image to it; later attacks find the answers in `data/cache`. Each stage is a
separate process; the stages take turns, so the load of the machine affects all. The table shows the median time in
seconds of training and evaluation (`wall_time_seconds` of results.json) and of the whole process, and their ratios to
training on labels.
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

ROOT = Path(__file__).resolve().parent.parent
RECIPE = {"dataset": "demo", "model_name": "net", "num_channels": 16, "learning_rate": 0.001, "batch_size": 128,
          "augmentation": 0}


def run(script: str, directory: Path, params: dict[str, object], data_dir: Path) -> tuple[float, float]:
    """Run a stage and return the seconds of training and evaluation, and of the whole process."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(RECIPE | params))
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), "--save_path", str(directory), "--data_dir", str(data_dir),
                    "--restart"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    results = json.loads((directory / "results.json").read_text())
    return results["wall_time_seconds"], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--epochs", type=int, default=4, metavar="N", help="epochs of each student (default: 4)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        run("train_scratch.py", root / "teacher", {"num_epochs": 1}, root)
        student = {"num_epochs": arguments.epochs, "teacher_model": "net", "teacher_num_channels": 16,
                   "teacher_resume": str(root / "teacher/last_model.tar"), "queries": "once", "teacher_cache": 1,
                   "labels": 0, "alpha": 1.0}
        times: dict[str, list[tuple[float, float]]] = {}
        for repeat in range(arguments.repeats):
            data = root / f"data{repeat}"  # with an empty cache
            times.setdefault("labels", []).append(run("train_scratch.py", root / "labels", {
                "num_epochs": arguments.epochs}, data))
            for name in ("first attack", "second attack"):
                times.setdefault(name, []).append(run("train_kd.py", root / "attack", student, data))
            times.setdefault("every view queried", []).append(run("train_kd.py", root / "attack", student | {
                "queries": "views", "teacher_cache": 0}, data))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    print(f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, median of {arguments.repeats}\n")
    print("| student of | training, s | ratio | process, s | ratio |\n|---|---|---|---|---|")
    for name, values in medians.items():
        cells = [f"{value:.2f} | {value / base:.2f}" for value, base in zip(values, medians["labels"], strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
