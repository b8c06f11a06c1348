"""Run experiments in the order of their dependencies, optionally several at a time.

    python scripts/run_all.py experiments/CIFAR10/baseline experiments/CIFAR10/kd_normal_resnet18
    python scripts/run_all.py experiments/CIFAR10 --jobs 4                # four runs share one GPU (or the CPU)
    python scripts/run_all.py experiments/CIFAR10 --jobs 8 --gpus 0 1    # four per GPU
    python scripts/run_all.py experiments/CIFAR10 --seeds 0 1 2          # also DIR/seed1, DIR/seed2 of each

Takes the given directories and all experiments below them. Checkpoints that they read must exist, or come from runs
among them. With one job, each run prints its log. With several, only starts and ends are printed, and the jobs share
the CPU threads (unless OMP_NUM_THREADS is set).

The same command skips finished runs and continues interrupted ones. If a run fails, or its params.json cannot be read,
the runs that do not depend on it still run. Exit status: 0 if everything is finished, 1 if everything that can be read
is finished, 2 if a run failed.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.directories import Run, find, is_seed, unreadable
from runs.graph import check_sources, needs, without
from runs.pool import Pool
from runs.seeds import write
from utils.cli import main
from utils.errors import UserError


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR",
                        help="experiments, or directories of experiments")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N",
                        help="0: the experiments themselves; others: as in scripts/seeds.py (default: all existing)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one, or one per GPU)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[], metavar="N",
                        help="GPUs that the runs are distributed over, as --gpu_id of a stage")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets (default: data)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands; run and write nothing")
    arguments = parser.parse_args()
    jobs = arguments.jobs if arguments.jobs is not None else max(1, len(arguments.gpus))
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: give at least 1")
    if wrong := [seed for seed in arguments.seeds if seed < 0]:
        raise UserError(f"--seeds: {wrong[0]} is not a seed: give 0 or more")
    runs, unread = _with_seeds(arguments.directories, arguments.seeds, arguments.dry_run)
    runs, skipped = without(runs, unread)
    print("".join(f"remark: left out: {text}\n" for text in skipped), end="")
    left_out = "; ".join([f"cannot be read: {directory / 'params.json'}" for directory in unread] + skipped)
    graph = needs(runs)
    check_sources(runs)
    by_directory = {run.directory: run for run in runs}
    waiting = [directory for directory in graph if not by_directory[directory].finished
               or by_directory[directory].stale]  # the stage itself reports what to do with stale runs
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(runs) - len(waiting)} of them finished")
    if arguments.dry_run:
        print("".join(f"{by_directory[directory].command}\n" for directory in waiting), end="")
        _end(left_out)
        return
    start_time = time.monotonic()
    pool = Pool(jobs, gpus=arguments.gpus, data_dir=arguments.data_dir, show=jobs == 1)  # parallel logs would mix
    failed = pool.run({directory: graph[directory] for directory in waiting}, by_directory)
    if waiting:
        done = len(waiting) - len(failed)
        print(f"{done} run{'s' * (done != 1)} in {time.monotonic() - start_time:.0f} s")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs are not finished: {', '.join(map(str, failed))}"
                        + f"; {left_out}" * bool(left_out))
    _end(left_out)


def _end(left_out: str) -> None:
    """Exit with status 1 if something could not be read, although nothing failed."""
    if left_out:
        sys.exit(f"error: {left_out}")


def _with_seeds(roots: list[Path], seeds: list[int], dry_run: bool) -> tuple[list[Run], list[Path]]:
    """Runs of these seeds, created if missing (without seeds: all runs), and the directories whose params.json cannot
    be read."""
    if absent := [root for root in roots if not root.is_dir()]:
        raise UserError(f"{absent[0]} " + ("is not a directory" if absent[0].exists() else
                                           f"does not exist in {Path.cwd()}"))
    runs, warnings = find(roots)
    print("".join(f"remark: {text}\n" for text in warnings), end="")
    if not runs:
        raise UserError("no experiment found: give directories that contain a params.json")
    places = {place for run in runs for place in (run.directory.resolve(), *run.directory.resolve().parents)}
    if bare := [root for root in roots if root.resolve() not in places]:
        raise UserError(f"{bare[0]} holds no experiment that can be read")
    print("".join(f"remark: {run.directory}: params.json was changed since it was run ({', '.join(run.stale)})\n"
                  for run in runs if run.stale), end="")
    unread = unreadable(roots, runs)
    if not seeds:
        return runs, unread
    plain = [run for run in runs if not is_seed(run.directory)]
    for seed in filter(None, seeds):
        for run in plain:
            if dry_run and not (run.directory / f"seed{seed}").exists():
                print(f"would make and run {run.directory / f'seed{seed}'}")
            elif not dry_run and run.directory / f"seed{seed}" not in unread:
                print("".join(f"remark: {text}\n" for text in write(run, seed, plain)[1]), end="")
    wanted = {f"seed{seed}" for seed in seeds}
    chosen = [run for run in find(roots)[0]
              if (run.directory.name in wanted if is_seed(run.directory) else 0 in seeds)]
    if not chosen and not dry_run:
        raise UserError(f"no experiment has seed {' or '.join(map(str, seeds))}")
    return chosen, [directory for directory in unread if not is_seed(directory) or directory.name in wanted]


if __name__ == "__main__":
    main(run_all)
