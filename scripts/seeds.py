"""Copy experiments to other seeds, each in its own directory: DIR/seed1, DIR/seed2, ...

    python scripts/seeds.py 1 2 experiments/CIFAR10/baseline experiments/CIFAR10/kd_nasty_resnet18

Takes the given directories and all experiments below them. Seed N's student uses seed N's teacher if there is one;
otherwise you get a warning. Existing files are left unchanged. `report.py` shows an experiment and its seeds as one
cell. If an experiment cannot be read, the others still get their seeds, and the exit status is 1.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.directories import find, is_seed, unreadable
from runs.seeds import write
from utils.cli import main
from utils.errors import UserError


def write_seeds() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", metavar="SEED ... DIR", help="seeds from 1, then directories")
    arguments = parser.parse_args().seeds
    seeds = [int(word) for word in arguments if word.isdecimal()]
    roots = [Path(word) for word in arguments if not word.isdecimal()]
    if not seeds or not roots:
        raise UserError("give seeds and directories: scripts/seeds.py 1 2 experiments/demo")
    if absent := [root for root in roots if not root.is_dir()]:
        raise UserError(f"{absent[0]} is neither a seed nor a directory")
    runs, warnings = find(roots)
    unread = [str(directory / "params.json") for directory in unreadable(roots, runs)]
    plain = [run for run in runs if not is_seed(run.directory)]
    warnings += [f"no experiment in {', '.join(map(str, roots))}"] * (not plain)
    written = there = 0
    for seed in seeds:
        for run in plain:
            new, seed_warnings = write(run, seed, plain)
            written, there = written + new, there + (not new)
            warnings += seed_warnings
    print("".join(f"remark: {text}\n" for text in warnings), end="")
    print(f"{written} written" + (f", {there} exist already" if there else ""))
    if unread:
        sys.exit(f"error: cannot be read: {', '.join(unread)}")


if __name__ == "__main__":
    main(write_seeds)
