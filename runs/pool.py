"""Execution of several runs at a time, each in its own process, in the order of their dependencies.

On Linux the processes are forked from one that has already imported torch; the import would take a third of a run of a
few seconds.
"""
from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runs.directories import Run
from utils import interrupts

ROOT = Path(__file__).resolve().parent.parent
# Modules imported before the fork. torch._dynamo is imported when an optimizer is built.
PRELOADED = ("train_scratch", "train_nasty", "train_kd", "train_poisoned", "train_datafree", "torch._dynamo")


class Watcher:
    """Callbacks for the state of runs. The defaults print one line each."""

    def started(self, run: Run, number: int, of: int) -> None:
        _print_line(f"[{number} of {of}] {run.command}")

    def finished(self, run: Run, seconds: float) -> None:
        _print_line(f"finished in {seconds:.0f} s: {run.directory}")

    def failed(self, run: Run, error: str) -> None:
        _print_line(f"failed: {run.directory}: {error}")

    def skipped(self, run: Run) -> None:
        _print_line(f"skipped, as a run that it needs failed: {run.directory}")


@dataclass
class _Running:
    run: Run
    process: BaseProcess
    slot: int
    started: float


class Pool:
    """Pool of processes that execute runs."""

    def __init__(self, jobs: int, *, gpus: Sequence[int] = (), data_dir: Path = Path("data"), show: bool = False,
                 watcher: Watcher | None = None) -> None:
        """jobs: runs at a time. gpus: numbers of the GPUs to distribute the runs over; empty: each run selects its
        device. show: show the output of the runs; otherwise only stderr is kept, for `failed`."""
        self.jobs, self.gpus, self.data_dir, self.show = jobs, gpus, data_dir, show
        self.watcher = watcher or Watcher()
        if jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self._context: Any = _context()
        self._free = list(range(jobs))[::-1]

    def run(self, graph: Mapping[Path, Iterable[Path]], runs: Mapping[Path, Run]) -> list[Path]:
        """Execute the runs of `graph`, which maps each directory to the directories that it needs; those that are not
        keys are finished. Returns the directories of the runs that failed or were skipped.

        An interrupt ends all processes; finished epochs are kept.
        """
        order = TopologicalSorter({at: [source for source in sources if source in graph]
                                   for at, sources in graph.items()})
        order.prepare()
        ready: list[Path] = []
        failed: list[Path] = []
        running: dict[Any, _Running] = {}  # by sentinel of the process
        number = 0
        with tempfile.TemporaryDirectory() as errors:
            try:
                while order.is_active():
                    ready += order.get_ready()
                    while ready and self._free:
                        at = ready.pop(0)
                        if any(source in failed for source in graph[at]):
                            self.watcher.skipped(runs[at])
                            failed.append(at)
                            order.done(at)
                            ready += order.get_ready()
                            continue
                        number += 1
                        self.watcher.started(runs[at], number, len(graph))
                        with interrupts.deferred():  # so that every started process is recorded
                            started = self._start(runs[at], Path(errors))
                            running[started.process.sentinel] = started
                    for sentinel in connection.wait(list(running)) if running else ():
                        ended = running.pop(sentinel)
                        if not self._end(ended, Path(errors)):
                            failed.append(ended.run.directory)
                        order.done(ended.run.directory)
            finally:
                for left in running.values():
                    left.process.terminate()
                for left in running.values():
                    left.process.join()
        return failed

    def _start(self, run: Run, errors: Path) -> _Running:
        slot = self._free.pop()
        words = [str(ROOT / run.params.script), "--save_path", str(run.directory), "--data_dir", str(self.data_dir)]
        if self.gpus:
            words += ["--gpu_id", str(self.gpus[slot % len(self.gpus)])]
        process = self._context.Process(target=_stage, args=(words, None if self.show else str(errors / str(slot))))
        started = _Running(run, process, slot, time.monotonic())
        process.start()
        return started

    def _end(self, ended: _Running, errors: Path) -> bool:
        """Report a run whose process has ended. Returns whether it succeeded."""
        ended.process.join()
        self._free.append(ended.slot)
        status, file = ended.process.exitcode, errors / str(ended.slot)
        if status:
            text = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
            if status == 2:  # a UserError, one line; otherwise a traceback
                text = text.rpartition("\n")[2]
            self.watcher.failed(ended.run, text or f"exit status {status}")
        else:
            self.watcher.finished(ended.run, time.monotonic() - ended.started)
        file.unlink(missing_ok=True)
        return not status


def _context() -> Any:
    if sys.platform != "linux":  # forking is not safe after system libraries are loaded
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The fork server finds modules only through the environment. Its check for a GPU must not initialize CUDA, which
    # would break forked processes.
    paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _stage(words: list[str], errors: str | None) -> None:
    """Run a stage by its command line, in a child process. errors: file for stderr, with stdout discarded; None: show
    both."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if errors:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # both stay open to the end
        sys.stderr = open(errors, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _end_with_parent() -> None:
    """Interrupt this process when its parent dies, so that the run directory does not stay locked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _print_line(text: str) -> None:
    print(f"{text}\n", end="", flush=True)
