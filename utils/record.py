"""Output of a run: the log, a checkpoint after every epoch, and results.json at the end."""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from utils import checkpoint, distributed, files
from utils.data import Images
from utils.logger import Logger, percentages
from utils.memory import Phase
from utils.networks import Networks
from utils.params import Params
from utils.results import Results, Row
from utils.resume import Start
from utils.run_directory import RunDirectory
from utils.training import Learner, Progress


class Record:
    """Log and checkpoints of one run. Only the first of several processes writes."""

    def __init__(self, directory: RunDirectory, params: Params, data: dict[str, Any],
                 sources: Mapping[str, Any], session: dict[str, Any]) -> None:
        """data: record of the run's data. sources: checkpoints that were read, by role. session: record of this
        call."""
        self.directory, self._params, self.data = directory, params, data
        self._sessions = [session]  # records of all calls of the run, this one last
        self._sources = sources
        self._writer = checkpoint.Writer()
        self._logger: Logger | None = None
        self._buffered_lines: list[str] = []  # lines logged before the log is open

    def log(self, text: str) -> None:
        """Write a line to the log, or buffer it until the log is open."""
        if self._logger:
            self._logger.info(text)
        else:
            self._buffered_lines.append(text)

    def start_session(self, progress: Progress, previous_sessions: Sequence[dict[str, Any]] = ()) -> None:
        """Record after which epoch this call continues, and the previous calls."""
        self._sessions = [*previous_sessions, {"after_epoch": progress.epoch, **self._sessions[-1]}]

    def prepare(self, start: Start, artifacts: Mapping[str, str]) -> None:
        """Prepare the directory: remove old files for `--restart`, write artifacts (texts by file name), and copy the
        best model of a run that is resumed from another directory."""
        self.directory.prepare(restart=start.restart)
        for name, text in artifacts.items():
            files.write_text(self.directory / name, text)
        best = self.directory / "best_model.tar"
        if start.state and start.best and start.best.path.resolve() not in (best.resolve(), start.state.path.resolve()):
            files.copy(start.best.path, best)

    def open(self, progress: Progress) -> None:
        """Open the log, continuing that of earlier calls."""
        self._logger = Logger(self.directory.path, progress.history)

    def log_header(self, network: nn.Module, progress: Progress, networks: Networks, parts: Mapping[str, Images],
                  loaded: Sequence[str]) -> None:
        """Log the setup of a call. loaded: lines about loaded networks."""
        session, params = self._sessions[-1], self._params
        lines = [f"{params.script} --save_path {self.directory.path}",
                 f"parameters: {json.dumps(params.model_dump())}"]
        if session["set"]:
            lines.append(f"set on the command line: {json.dumps(session['set'])}")
        lines.append("device: {device}; processes: {processes}; precision: {precision}; torch {versions[torch]}".format(
            **session))
        if progress.epoch and self._sessions[-2]["precision"] != session["precision"]:
            lines.append(f"precision: {self._sessions[-2]['precision']} until epoch {progress.epoch}")
        if session["emulated"]:
            lines.append("precision: this device emulates bfloat16, which is slow")
        counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        lines.append(f"{params.dataset}: {len(self.data['classes'])} classes, images: {counts}")
        lines.append(f"{params.model_name}: {count_parameters(network)} parameters")
        for role, source in networks.sources.items():
            key = f"#{source['key']}" if "key" in source else ""
            lines.append(f"{role}: {source['path']}{key}, SHA-256 {source['sha256']}")
        for text in (*lines, *networks.warnings, *loaded, *self._buffered_lines):
            self.log(text)
        if progress.epoch:
            self.log(f"resuming after epoch {progress.epoch} of {params.num_epochs}")

    def images(self, images: Mapping[str, Tensor], epoch: int) -> None:
        """Log images, (B, 3, H, W) in [0, 1] by name."""
        for name, pixels in images.items():
            self._open_logger.images(name, pixels, epoch)

    @Phase("saving the epoch", "saved checkpoints are kept")
    def epoch(self, network: nn.Module, learner: Learner, progress: Progress) -> None:
        """Save and log the finished epoch."""
        self.save(network, learner, progress)
        self._open_logger.epoch(progress, self._params.num_epochs)
        if progress.epoch % max(1, self._params.num_epochs // 10) == 0:
            self.images(learner.epoch_images(), progress.epoch)

    def save(self, network: nn.Module, learner: Learner, progress: Progress, *, wait: bool = False) -> None:
        """Write last_model.tar and, if no epoch was better, best_model.tar; in the background unless `wait`. Raises the
        OSError of the previous save and, with `wait`, of this one."""
        if distributed.rank():
            return
        best = [self.directory / "best_model.tar"] if progress.best["epoch"] == progress.epoch else []
        state = learner.state_dict()
        self._writer.save({
            "epoch": progress.epoch, "state_dict": network.state_dict(), "optim_dict": state.pop("optim_dict"),
            "learner": state, "stage": self._params.script, "params": self._params.model_dump(), "data": self.data,
            "sources": self._sources, "sessions": self._sessions, "history": progress.history,
            "timings": progress.timings,
        }, self.directory / "last_model.tar", *best)
        if wait:
            self._writer.wait()

    @Phase("evaluating the finished network")
    def finish(self, network: nn.Module, progress: Progress, evaluated_before: dict[str, Row],
               final: Mapping[str, Callable[[nn.Module], Any]], queries: dict[str, int]) -> None:
        """Write results.json. final: functions of the trained network that return further entries, called in all
        processes. queries: number of images that were sent to each network, by role."""
        self._writer.wait()
        best, last = progress.best, progress.history[-1]
        seconds = sum(timing["seconds"] for timing in progress.timings)
        chosen = "validation" if "validation_accuracy" in best else "test"
        self.log(f"finished: test accuracy {last['test_accuracy']:.2f} % at the last epoch, "
                 f"{best['test_accuracy']:.2f} % at the best epoch on {chosen} images ({best['epoch']}); "
                 f"{seconds:.0f} s")
        for role, count in queries.items():
            self.log(f"queries: {count} images were sent to the {role}")
        details = {name: entry(network) for name, entry in final.items()}
        if distributed.rank():
            return
        Results(
            stage=self._params.script, best=best, last=last, params=self._params.model_dump(), seed=self._params.seed,
            wall_time_seconds=seconds, images_per_second=progress.images_per_second, sessions=self._sessions,
            data=self.data, num_parameters=count_parameters(network), checkpoints_read=dict(self._sources),
            evaluated_before=evaluated_before, details=details, queries=queries,
            finished=time.strftime("%Y-%m-%d %H:%M:%S"),
            **{key: value for key, value in self._sessions[-1].items() if key not in ("after_epoch", "emulated")},
        ).write(self.directory / "results.json")

    def close(self, error: BaseException | None = None) -> None:
        """Log the error if there is one, wait for the last save, close the log and unlock the directory."""
        try:
            if self._logger and error:
                self._logger.stopped(error)
            with contextlib.suppress(OSError):  # a full disk: reported already
                self._writer.wait()
            if self._logger:
                self._logger.close()
        finally:
            self.directory.unlock()

    @property
    def _open_logger(self) -> Logger:
        assert self._logger is not None, "the log is not open"
        return self._logger


def loaded_lines(evaluated: Mapping[str, Row], warnings: Sequence[Callable[[str, Row], str]]) -> list[str]:
    """Log lines with the metrics of each loaded network and the warnings about it."""
    return [f"{role}: {percentages(row)}" + "".join(f" ({text})" for warn in warnings if (text := warn(role, row)))
            for role, row in evaluated.items()]


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

