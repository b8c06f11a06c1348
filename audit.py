"""Audit a model: measure by many attacks how much can be stolen through its outputs, and the price of protection.

    python audit.py --save_path experiments/demo/audits/nasty
    python audit.py --save_path experiments/demo/audits/nasty --dry_run
    python audit.py --save_path experiments/demo/audits/nasty --set seeds=[0,1,2] 'interfaces=["label"]'
    python audit.py --compare experiments/demo/audits/normal experiments/demo/audits/nasty

DIR/params.json describes the model (`model_name`, `checkpoint`), the data set, the training of the students
(`num_epochs`, `learning_rate`, ...) and, optionally, the attacks, interfaces and thieves to try. Each student is a run
below DIR/runs. Writes audit.md, audit.json, audit.csv and figures to DIR.

The same command continues an interrupted audit; finished students are not trained again. `--lay_out` only writes the
run directories, for example for `snakemake --config experiments=DIR/runs`; the command without it then finishes the
audit. All keys of params.json: `python -m utils.params audit`. The format of audit.json: `python audit.py --schema`.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from audits import document, figures
from audits.model import Evaluated, evaluate_model
from audits.plan import Plan, plan, same_grid
from audits.progress import Bar, cost, duration, seconds_left
from audits.result import Audit, summarize
from runs.audits import OF_MODEL, AuditParams
from runs.directories import Run, find, is_audit
from runs.pool import Pool
from runs.stages import AUDIT
from utils import cli, session
from utils.data import split
from utils.data_record import changes, describe
from utils.errors import UserError
from utils.files import write_text
from utils.params import DataParams, load_params, parse_overrides
from utils.run_directory import RunDirectory


def audit() -> None:
    arguments = _parser().parse_args()
    if arguments.schema:
        print(json.dumps(Audit.model_json_schema(), indent=1))
    elif arguments.compare:
        print(document.comparison([(name, _read(Path(name))) for name in arguments.compare]))
    elif not arguments.save_path:
        raise UserError("--save_path is missing: give the directory of the audit, which holds a params.json")
    elif arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}: give at least 1")
    else:
        _audit(arguments)


def _audit(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.save_path
    overrides = parse_overrides(arguments.set)
    params: AuditParams = load_params(directory / "params.json", AUDIT, overrides)
    reference = _unprotected_audit(params.unprotected, overrides)
    locks = [RunDirectory(place) for place in [directory, *([reference[0]] if reference else [])]]
    if not arguments.dry_run:  # it writes nothing
        for lock in locks:
            lock.lock("another audit is running")
    model = evaluate_model(params, arguments.data_dir, arguments.device,
                           unprotected=reference[1].checkpoint if reference else params.unprotected)
    grid = _grid(params, directory, reference, model)
    jobs = arguments.jobs or len(arguments.gpus) or _default_jobs(params)
    runs: list[Run] = []
    if not arguments.restart:
        grid.check()
        runs = _runs(grid)
        _check_checkpoints(grid, model, runs)
        _check_images(grid, model, runs)
    if arguments.dry_run:
        _print_dry_run(grid, model, jobs, runs)
        return
    if arguments.restart:
        shutil.rmtree(directory / "runs", ignore_errors=True)
        grid.check()
    grid.write()
    if arguments.lay_out:
        finished = sum(run.finished for run in _runs(grid))
        print(f"{len(grid.directories())} runs are laid out, {finished} of them finished")
        return
    failed = _train(grid, model, jobs, arguments.gpus, arguments.data_dir)
    versions = session.describe(torch.device("cpu"), torch.float32, {})["versions"]
    result = summarize(grid, params, model, failed, versions)
    figure_files = figures.draw(result, directory)
    write_text(directory / "audit.json", result.model_dump_json(indent=1) + "\n")
    write_text(directory / "audit.csv", document.table(result, grid))
    write_text(directory / "audit.md", document.document(result, params, directory, figure_files))
    print(document.terminal(result, directory))
    names = ["audit.md", "audit.json", "audit.csv", *(file.name for file in figure_files)]
    print(f"Written to {directory}: {', '.join(names)}.")
    if failed:
        raise UserError(f"{len(failed)} of {len(grid.directories())} runs are not finished: "
                        f"{', '.join(map(str, failed))}")


def _grid(params: AuditParams, directory: Path, reference: tuple[Path, AuditParams] | None, model: Evaluated) -> Plan:
    """Grid of an audit, joined with the grid of the unprotected model's audit for comparison."""
    if reference is None:
        return plan(params, directory, model.sizes)
    if differing := same_grid(params, reference[1]):
        raise UserError(f'"unprotected": the audit in {reference[0]} differs in {", ".join(differing)}: give both '
                        "audits the same values")
    unprotected = reference[1].model_copy(update={"interfaces": ["logits"], "answer_defenses": ["none"],
                                               "unprotected": None})
    return Plan.joined([plan(params, directory, model.sizes, references=reference[0]),
                        plan(unprotected, reference[0], model.sizes).as_unprotected()])


def _unprotected_audit(unprotected: str | None, overrides: dict[str, Any]) -> tuple[Path, AuditParams] | None:
    """Directory and parameters of the unprotected model's audit, if one is named; --set also changes its grid."""
    file = Path(unprotected or "") / "params.json"
    if not unprotected or not is_audit(file):
        return None
    grid = {key: value for key, value in overrides.items() if key not in OF_MODEL}
    return file.parent, load_params(file, AUDIT, grid)


def _train(grid: Plan, model: Evaluated, jobs: int, gpus: list[int], data_dir: Path) -> list[Path]:
    """Train the unfinished students. Returns the directories of failed runs."""
    waiting = {run.directory: run for run in _runs(grid) if not run.finished}
    bar = Bar({directory: cost(run, model.sizes, model.test_images) for directory, run in waiting.items()})
    try:
        return Pool(jobs, gpus=gpus, data_dir=data_dir, watcher=bar).run({each: [] for each in waiting}, waiting)
    finally:
        bar.close()


def _runs(grid: Plan) -> list[Run]:
    """Runs of a grid whose directories exist."""
    runs, warnings = find([directory for directory in grid.directories() if (directory / "params.json").exists()])
    if warnings:
        raise UserError("; ".join(warnings))
    return runs


def _check_checkpoints(grid: Plan, model: Evaluated, runs: list[Run]) -> None:
    """Raise UserError if a checkpoint has changed since a finished student learned from it."""
    read = {run.directory: {each["sha256"] for each in run.results.checkpoints_read.values()}
            for run in runs if run.results}
    now = {"model": model.source, "unprotected": model.unprotected}
    for attempt in grid.attempts:
        source = now.get(attempt.victim)
        for directory in map(attempt.run_directory, grid.seeds):
            if source and read.get(directory) and source["sha256"] not in read[directory]:
                raise UserError(f"{source['path']} has changed since {directory} learned from it: choose another "
                                "directory, or delete its runs with --restart")


def _check_images(grid: Plan, model: Evaluated, runs: list[Run]) -> None:
    """Raise UserError if the images have changed since a finished student was trained or tested on them."""
    data = {run.directory: run.results.data for run in runs if run.results and run.results.data}
    records: dict[tuple[str, int | None], dict[str, Any]] = {}
    for attempt in grid.attempts:
        params = attempt.params()
        directories = [place for place in map(attempt.run_directory, grid.seeds) if place in data]
        if not directories or not isinstance(params, DataParams):
            continue
        name = getattr(params, "transfer_set", None) or params.dataset
        if (name, attempt.images) not in records:
            dataset = model.datasets[name]
            records[name, attempt.images] = describe(dataset, split(dataset, params, torch.device("cpu")))
        for directory in directories:
            if changed := changes(data[directory], records[name, attempt.images]):
                raise UserError(f"the data have changed since {directory} was trained ({', '.join(changed)}): choose "
                                "another directory, or delete its runs with --restart")


def _print_dry_run(grid: Plan, model: Evaluated, jobs: int, runs: list[Run]) -> None:
    finished = [run for run in runs if run.finished]
    costs = {attempt.run_directory(seed): cost(Run(attempt.run_directory(seed), attempt.params()), model.sizes,
                                               model.test_images) for attempt in grid.attempts for seed in grid.seeds}
    left = seconds_left(costs, finished, jobs)
    print(f"accuracy of the model: {model.prices['logits']['accuracy']:.2f} % of {model.test_images:,} test images")
    if len(finished) == len(costs):
        print(f"{len(costs)} students, all of them finished")
        return
    print(f"{len(costs)} students, {len(finished)} of them finished; " + (
        f"about {duration(left)} for the others, {jobs} at a time, estimated from these" if left is not None else
        f"the time, {jobs} at a time, is estimated once the first are finished"))


def _read(directory: Path) -> Audit:
    file = directory / "audit.json"
    try:
        return Audit.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: run `python audit.py --save_path {directory}` first") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged or of another version: {str(error).splitlines()[0]}") from None


def _default_jobs(params: AuditParams) -> int:
    """Default number of simultaneous students: one with a GPU, otherwise one per core available to this process."""
    if params.cuda and torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_path", type=lambda path: Path(cli.recorded(path)), metavar="DIR",
                        help="directory of the audit, which holds a params.json")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="print finished audits side by side; run nothing")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="students trained at a time (default: one per GPU; without a GPU, one per core)")
    parser.add_argument("--gpus", nargs="+", type=int, default=[], metavar="N", help="GPUs that train the students")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets (default: data)")
    parser.add_argument("--device", default="auto", metavar="DEVICE",
                        help="device that evaluates the model itself: auto, cpu, cuda or cuda:N (default: auto); "
                             "students select their own, or use --gpus")
    parser.add_argument("--set", nargs="+", action="extend", default=[], type=cli.recorded, metavar="KEY=VALUE",
                        help="parameters of this audit that override params.json")
    parser.add_argument("--dry_run", action="store_true",
                        help="print the number of students and an estimate of the time; write nothing")
    parser.add_argument("--lay_out", action="store_true", help="write the directories of the runs; train nothing")
    parser.add_argument("--restart", action="store_true",
                        help="start over: delete the students of an earlier audit")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of audit.json")
    return parser


if __name__ == "__main__":
    cli.main(audit)
