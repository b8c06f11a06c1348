"""Runs several at a time, each in a process of its own that begins when what it needs is finished.

The processes are forked from one that has imported torch already, where the system can fork: of a run of a few seconds
the import is a third.
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
# Imported before the forks, by what a run imports: the last one is what an optimizer imports when it is built.
PRELOADED = ("train_scratch", "train_nasty", "train_kd", "train_poisoned", "train_datafree", "torch._dynamo")


class Watcher:
    """Is told what becomes of the runs. This one prints a line each time."""

    def started(self, run: Run, number: int, of: int) -> None:
        _print_line(f"[{number} of {of}] {run.command}")

    def finished(self, run: Run, seconds: float) -> None:
        _print_line(f"finished in {seconds:.0f} s: {run.directory}")

    def failed(self, run: Run, error: str) -> None:
        _print_line(f"failed: {run.directory}: {error}")

    def skipped(self, run: Run) -> None:
        _print_line(f"left out, as it needs what failed: {run.directory}")


@dataclass
class _Running:
    run: Run
    process: BaseProcess
    slot: int
    started: float


class Pool:
    """Processes of runs."""

    def __init__(self, jobs: int, *, gpus: Sequence[int] = (), data_dir: Path = Path("data"), show: bool = False,
                 watcher: Watcher | None = None) -> None:
        """jobs: runs at a time. gpus: their numbers, over which the runs are spread; none: the device is up to each
        run. show: whether what the runs print is shown; else only what they print on stderr is kept, for `failed`."""
        self.jobs, self.gpus, self.data_dir, self.show = jobs, gpus, data_dir, show
        self.watcher = watcher or Watcher()
        if jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        self._context: Any = _context()
        self._free = list(range(jobs))[::-1]

    def run(self, graph: Mapping[Path, Iterable[Path]], runs: Mapping[Path, Run]) -> list[Path]:
        """Run what `graph` holds: directories, and for each those that it needs, of which the ones that are not in
        `graph` are finished. Returns the directories whose runs failed or needed one that did.

        An interrupt ends all processes; each keeps the epochs that it has finished.
        """
        order = TopologicalSorter({at: [source for source in sources if source in graph]
                                   for at, sources in graph.items()})
        order.prepare()
        ready: list[Path] = []
        failed: list[Path] = []
        running: dict[Any, _Running] = {}  # by what tells the end of a process
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
                        with interrupts.deferred():  # else a process could be begun of which nobody knows
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
        """Tell what became of a run whose process has ended. Returns whether it is finished."""
        ended.process.join()
        self._free.append(ended.slot)
        status, file = ended.process.exitcode, errors / str(ended.slot)
        if status:
            text = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
            if status == 2:  # one line; else all that there is to know
                text = text.rpartition("\n")[2]
            self.watcher.failed(ended.run, text or f"exit status {status}")
        else:
            self.watcher.finished(ended.run, time.monotonic() - ended.started)
        file.unlink(missing_ok=True)
        return not status


def _context() -> Any:
    if sys.platform != "linux":  # where a process that has loaded the system's libraries cannot safely be forked
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Its modules are found by the environment alone, and a question whether there is a GPU must not open it: a process
    # that was forked afterwards could not.
    paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _stage(words: list[str], errors: str | None) -> None:
    """In a process of its own: a stage, as by its command line. errors: a file for what it prints on stderr, when the
    rest is not shown either."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if errors:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # both are open to the end
        sys.stderr = open(errors, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _end_with_parent() -> None:
    """Interrupt this process once its parent has gone, by a kill for example: whoever starts the runs again would find
    their directories locked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _print_line(text: str) -> None:
    print(f"{text}\n", end="", flush=True)
