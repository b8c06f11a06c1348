"""Start of a run in a directory: new, from given weights, resumed, or already finished.

    empty directory                      new run
    last_model.tar of the same run       resumed from it
    results.json of the same run         finished
    either, with other parameters        error that names them
    --restart                            new run in any case
    --resume FILE, state of a run        resumed from it in this directory (same parameters)
    --resume FILE, only weights          new run from these weights

Repeating a command with --resume FILE resumes the run that it started. This module writes nothing.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import checkpoint, cli, files
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.params import Params, changed_keys
from utils.results import Results
from utils.run_directory import RunDirectory
from utils.training import Progress

# Further keys of a checkpoint from which a run can be resumed.
STATE_KEYS = {"stage": str, "params": dict, "data": dict, "sources": dict, "sessions": list, "history": list,
              "timings": list, "optim_dict": dict}


@dataclass(frozen=True)
class Start:
    """Decision; at most one of `finished`, `state` and `weights` is set."""

    restart: bool = False  # remove the files of an earlier run first
    given: Checkpoint | None = None  # file of --resume, if it is in another directory

    finished: str | None = None  # message: nothing to do
    state: Checkpoint | None = None  # resume from this
    best: Checkpoint | None = None  # best model so far of the run to resume
    weights: Checkpoint | None = None  # initial weights of a new run


def is_state(given: Checkpoint) -> bool:
    """Whether a run can be resumed from a checkpoint, rather than started from its weights."""
    content = given.content
    if not all(isinstance(content.get(key), kind) for key, kind in STATE_KEYS.items()):
        return False
    rows, timings, sources = content["history"], content["timings"], content["sources"].values()
    return 0 < len(rows) == len(timings) == content.get("epoch") and \
        all(_is_row(row, {"epoch", "test_accuracy"}) and row["epoch"] == i for i, row in enumerate(rows, 1)) and \
        all(_is_row(row, {"images_per_second", "seconds"}) for row in timings) and \
        all(isinstance(source, dict) and {"path", "sha256"} <= source.keys() for source in sources)


def _is_row(row: Any, keys: set[str]) -> bool:
    return isinstance(row, dict) and keys <= row.keys() and \
        all(isinstance(value, int | float) for value in row.values())


def is_in_directory(directory: Path, given: Checkpoint) -> bool:
    """Whether a checkpoint was read from this directory."""
    return given.path.resolve().parent == directory.resolve()


def progress_of(state: Checkpoint) -> Progress:
    return Progress(list(state.content["history"]), list(state.content["timings"]))


def open_start(directory: RunDirectory, params: Params, resume: str | None, *, restart: bool) -> Start:
    """Decide how the run in a directory starts, from the options of the command line.

    resume: file of --resume; `cli.LAST`: there must be a run to resume. Raises UserError if the run cannot start, or
    if a checkpoint among the parameters is missing or would be removed.
    """
    require_run = resume == cli.LAST
    given = checkpoint.load(resume, "--resume") if resume and not require_run else None
    start = decide(directory.path, params, given=given, require_run=require_run, restart=restart)
    if start.finished:
        return start
    for key, path in params.checkpoints().items():  # before any download
        checkpoint.check_exists(path, key)
        if restart and files.split_key(path)[0].resolve() in [old.resolve() for old in directory.written()]:
            raise UserError(f"{key}: --restart would remove {path}: move it to another directory first")
    if start.weights and params.init_from:
        raise UserError(f"--resume {start.weights.path} and init_from {params.init_from} contradict each other: "
                        "give one of them")
    foreign = given if given and not is_in_directory(directory.path, given) else None
    return dataclasses.replace(start, restart=restart, given=foreign)


def learner_state(state: Checkpoint) -> dict[str, Any]:
    """State of a learner in a checkpoint. Earlier versions had its entries at the top level."""
    content = state.content
    return {**content.get("learner", content), "optim_dict": content["optim_dict"], "epoch": content["epoch"]}


def decide(directory: Path, params: Params, *, given: Checkpoint | None, require_run: bool, restart: bool) -> Start:
    """Decide how a run with these parameters starts. Raises UserError if it cannot.

    given: checkpoint of --resume. require_run: --resume without a file, so there must be a run to resume.
    """
    own = given if given and is_in_directory(directory, given) else None
    if restart:
        if require_run:
            raise UserError("--resume and --restart contradict each other: give one of them")
        if own:
            raise UserError(f"--resume {own.path} and --restart contradict each other: --restart removes that file")
        return _start_new(given, params)

    results, last = read_results(directory), _read_last(directory, own is not None)
    if given and not own and (results or last):
        sources = last.content["sources"] if last else results.checkpoints_read if results else {}
        known = {checkpoint.weights_id(sources.get("resume", {})), last.sha256 if last else None}
        if checkpoint.weights_id(given.source) not in known:
            raise UserError(f"--resume {given.path}: {directory} already holds a run that did not start from it; "
                            "--restart removes that run")
    if own and not is_state(own):
        raise UserError(f"--resume {own.path}: a new run would replace this file: move it to another directory first")
    if own and last and own.sha256 != last.sha256:
        raise UserError(f"--resume {own.path}: the run in {directory} resumes from its last_model.tar: leave out "
                        "--resume")
    state = last or own
    if results and results.last["epoch"] == params.num_epochs:
        _check_same_run(results.stage, results.params, params.num_epochs, params, directory)
        return Start(finished=_finished(directory, results))
    if state:
        _check_state(state, params, directory)
        return Start(state=state, best=_best_of(state))
    if results:
        _check_same_run(results.stage, results.params, int(results.last["epoch"]), params, directory)
        raise UserError(f"{directory} holds a finished run of {results.last['epoch']} epochs but no last_model.tar "
                        "to resume from; --restart removes it and starts over")
    if require_run:
        raise UserError(f"--resume: {directory / 'last_model.tar'} does not exist, so there is no run to resume")
    start, best = _start_new(given, params), directory / "best_model.tar"
    if best.exists() and not (start.best and start.best.sha256 == files.sha256(best)):
        raise UserError(f"{best} exists without a last_model.tar, and a new run would replace it: move it to another "
                        "directory, or remove it with --restart")
    return start


def _start_new(given: Checkpoint | None, params: Params) -> Start:
    """Start in a directory without a run, from a checkpoint of another directory (--resume)."""
    if given is None:
        return Start()
    if not is_state(given):
        return Start(weights=given)
    _check_state(given, params, given.path, 'to use only its weights, give it as "init_from"')
    return Start(state=given, best=_best_of(given))


def _best_of(state: Checkpoint) -> Checkpoint:
    """Best model of the run of a state: the state itself, or best_model.tar in its directory."""
    epoch = progress_of(state).best["epoch"]
    if epoch == state.content["epoch"]:
        return state
    best = checkpoint.load(state.path.with_name("best_model.tar"), "the best model so far")
    if best.content.get("epoch") != epoch:
        raise UserError(f"{best.path} is not the best model (epoch {epoch}) of the run of {state.path}; --restart "
                        "removes it and starts over")
    return best


def _read_last(directory: Path, own: bool) -> Checkpoint | None:
    path = directory / "last_model.tar"
    if not path.exists():
        return None
    last = checkpoint.load(path, "last_model.tar (--restart removes it and starts over)")
    if is_state(last):
        return last
    if own:
        return None
    raise UserError(f"{path} holds weights but no state to resume from: move it to another directory (and give it to "
                    "--resume to start from its weights), or remove it with --restart")


def read_results(directory: Path) -> Results | None:
    """Read results.json; None if it is missing or damaged, as last_model.tar decides then."""
    try:
        return Results.read(directory / "results.json")
    except (UserError, OSError):
        return None


def _check_state(state: Checkpoint, params: Params, where: Path,
                 remedy: str = "--restart removes it and starts over") -> None:
    content = state.content
    _check_same_run(content["stage"], content["params"], len(content["history"]), params, where, remedy)


def _check_same_run(stage: str, recorded: dict[str, Any], epochs: int, params: Params, where: Path,
                    remedy: str = "--restart removes it and starts over") -> None:
    if stage != params.script:
        raise UserError(f"{where} holds a run of {stage}, not of {params.script}; {remedy}")
    changed = changed_keys(recorded, params)
    planned = max(number for number in (recorded.get("num_epochs"), epochs) if isinstance(number, int))
    if planned > params.num_epochs and not any(text.startswith("num_epochs ") for text in changed):
        changed.append(f"num_epochs ({planned} -> {params.num_epochs})")  # a forgotten --set, most likely
    if changed:
        raise UserError(f"{where} holds a run with other parameters: {', '.join(changed)}; to resume it, restore them "
                        f"(repeat its --set); {remedy}")


def _finished(directory: Path, results: Results) -> str:
    """Message about a finished run, with the checkpoints that have changed since it read them."""
    text = f"{directory}: already finished, {results.last['epoch']} epochs (--restart runs it again)"
    for role, source in results.checkpoints_read.items():
        path = Path(source["path"])
        if path.is_file() and files.sha256(path) != source["sha256"]:
            text += f"; {role}: {path} has changed since"
    return text
