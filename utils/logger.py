"""What a run writes for people: training.log, metrics.csv, TensorBoard, and the same lines in the terminal."""
from __future__ import annotations

import contextlib
import csv
import sys
import threading
import time
from pathlib import Path
from typing import IO

from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, first_line
from utils.training import Progress, Row


class Logger:
    """Open the logs of a run; only the first process of several writes."""

    def __init__(self, directory: Path, history: list[Row]) -> None:
        self.directory = directory
        self.writes = distributed.rank() == 0
        if not self.writes:
            return
        self._log = self._open("training.log", "a")
        self._metrics = self._open("metrics.csv", "w")
        self._writer: csv.DictWriter | None = None
        for row in history:  # rewritten whole: a kill may have left a row too few or half a row
            self._write_metrics(row)
        from torch.utils.tensorboard import SummaryWriter  # costs a second, so not for --help and errors

        threading.excepthook = _without_os_errors  # its thread's; the next call from here raises the same
        self._board = SummaryWriter(str(directory), purge_step=len(history) + 1 if history else None)

    def info(self, text: str) -> None:
        """A line for people, in training.log and in the terminal."""
        if self.writes:
            self._log.write(f"{_now()}  {text}\n")
            self._log.flush()
            say(text)

    def epoch(self, progress: Progress, num_epochs: int) -> None:
        """The newest row of a run: a line in the log, a row in metrics.csv, points of the curves."""
        if not self.writes:
            return
        row, timing, best = progress.history[-1], progress.timings[-1], progress.best
        accuracy = "  ".join(f"{name.replace('_', ' ')} {value:.2f} %"
                             for name, value in row.items() if name.endswith("_accuracy"))
        losses = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items()
                           if name not in ("epoch", "learning_rate") and not name.endswith("_accuracy"))
        self.info(f"epoch {progress.epoch}/{num_epochs}  lr {row['learning_rate']:g}  {losses}  {accuracy}  best "
                  f"{best['test_accuracy']:.2f} % (epoch {best['epoch']})  {timing['images_per_second']:.0f} images/s")
        self._write_metrics(row)
        for name, value in {**row, "images_per_second": timing["images_per_second"]}.items():
            if name != "epoch":
                self._board.add_scalar(_tag(name), value, progress.epoch)
        self._board.flush()

    def images(self, title: str, images: Tensor) -> None:
        """A grid of images (B, 3, H, W) with values in [0, 1]."""
        if self.writes:
            self._board.add_images(title, images)

    def stopped(self, error: BaseException) -> None:
        """The last line of a run that did not finish, in training.log alone: the terminal hears of it elsewhere."""
        if self.writes:
            with contextlib.suppress(OSError):
                self._log.write(f"{_now()}  stopped: {first_line(error)}\n")
                self._log.flush()

    def close(self) -> None:
        if self.writes:
            for file in (self._board, self._metrics, self._log):
                with contextlib.suppress(OSError):  # a full disk: said already
                    file.close()

    def _open(self, name: str, mode: str) -> IO[str]:
        try:
            return open(self.directory / name, mode, encoding="utf-8", newline="" if name.endswith("csv") else None)
        except OSError as error:
            raise UserError(f"cannot write {self.directory / name}: {error.strerror}") from None

    def _write_metrics(self, row: Row) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._metrics, list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(row)
        self._metrics.flush()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _without_os_errors(thread: threading.ExceptHookArgs) -> None:
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def say(text: str) -> None:
    """A line in the terminal of the first process, above any progress bar."""
    if distributed.rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def _tag(name: str) -> str:
    part, _, quantity = name.rpartition("_")
    if quantity in ("accuracy", "loss") and part:
        return f"{quantity}/{part}"
    return name if name in ("learning_rate", "gradient_norm", "images_per_second") else f"loss/{name}"
