"""Log of a run: training.log (also printed to the terminal), metrics.csv and TensorBoard."""
from __future__ import annotations

import contextlib
import csv
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from utils import distributed
from utils.console import print_line
from utils.errors import UserError, first_line, one_line
from utils.training import Progress, Row


class Logger:
    """Logs of a run. Only the first of several processes writes."""

    def __init__(self, directory: Path, history: list[Row]) -> None:
        self.directory = directory
        self.writes = distributed.rank() == 0
        if not self.writes:
            return
        self._log = self._open("training.log", "a")
        self._metrics = self._open("metrics.csv", "w")
        self._rows: list[Row] = []
        self._columns: dict[str, None] = {}  # ordered
        for row in history:  # rewritten, since a kill may have left an incomplete file
            self._write_metrics(row)
        from torch.utils.tensorboard import SummaryWriter  # takes a second, so not for --help and errors

        threading.excepthook = _without_os_errors  # OSErrors of its thread; the next call raises them again
        self._board = SummaryWriter(str(directory), purge_step=len(history) + 1 if history else None)

    def info(self, text: str) -> None:
        """Write a line to training.log and the terminal; control characters are escaped."""
        if self.writes:
            self._log.write(f"{_now()}  {one_line(text)}\n")
            self._log.flush()
            print_line(text)

    def epoch(self, progress: Progress, num_epochs: int) -> None:
        """Log the newest epoch: a line in the log, a row in metrics.csv, points of the TensorBoard curves."""
        if not self.writes:
            return
        row, timing, best = progress.history[-1], progress.timings[-1], progress.best
        losses = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items()
                           if name not in ("epoch", "learning_rate") and not is_percentage(name))
        self.info(f"epoch {progress.epoch}/{num_epochs}  lr {row['learning_rate']:g}  {losses}  {percentages(row)}  "
                  f"best {best['test_accuracy']:.2f} % (epoch {best['epoch']})  "
                  f"{timing['images_per_second']:.0f} images/s")
        self._write_metrics(row)
        for name, value in {**row, "images_per_second": timing["images_per_second"]}.items():
            if name != "epoch":
                self._board.add_scalar(_tag(name), value, progress.epoch)
        self._board.flush()

    def images(self, name: str, images: Tensor, epoch: int) -> None:
        """Log images (B, 3, H, W) with values in [0, 1] as a grid, in TensorBoard and in NAME.png (the newest)."""
        if self.writes:
            images = images.cpu()
            self._board.add_images(name, images, epoch)
            Image.fromarray(_grid(images).mul(255).byte().numpy()).save(self.directory / f"{name}.png")

    def stopped(self, error: BaseException) -> None:
        """Log why a run stopped, in training.log only; the terminal shows the error itself."""
        if self.writes:
            with contextlib.suppress(OSError):
                self._log.write(f"{_now()}  stopped: {one_line(first_line(error))}\n")
                self._log.flush()

    def close(self) -> None:
        if self.writes:
            for file in (self._board, self._metrics, self._log):
                with contextlib.suppress(OSError):  # a full disk, already reported
                    file.close()

    def _open(self, name: str, mode: str) -> IO[str]:
        try:
            return open(self.directory / name, mode, encoding="utf-8", errors="backslashreplace",  # paths may be bytes
                        newline="" if name.endswith("csv") else None)
        except OSError as error:
            raise UserError(f"cannot write {self.directory / name}: {error.strerror}") from None

    def _write_metrics(self, row: Row) -> None:
        self._rows.append(row)
        new: list[Mapping[str, Any]] = [row]
        if not self._columns.keys() >= row.keys():  # the first row, or a method logs more in late epochs
            self._columns |= dict.fromkeys(row)
            self._metrics.seek(0)
            new = [{name: name for name in self._columns}, *self._rows]
        csv.DictWriter(self._metrics, list(self._columns), lineterminator="\n").writerows(new)
        self._metrics.flush()


def is_percentage(name: str) -> bool:
    return name.endswith("_accuracy") or name in ("asr", "base_rate", "target_recall", "suspicious")


def percentages(row: Row) -> str:
    """Format the entries of a row that are in percent."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.2f} %" for name, value in row.items() if is_percentage(name))


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _without_os_errors(thread: threading.ExceptHookArgs) -> None:
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def _grid(images: Tensor) -> Tensor:
    """Arrange images (B, 3, H, W) in rows of up to eight with a border of one pixel: (height, width, 3)."""
    columns = min(8, len(images))
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
    black = framed.new_zeros(-len(images) % columns, *framed.shape[1:])
    rows = torch.cat([framed, black]).unflatten(0, (-1, columns))
    return rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def _tag(name: str) -> str:
    part, _, quantity = name.rpartition("_")
    if is_percentage(name) and quantity != "accuracy":
        return f"backdoor/{name}"
    if quantity in ("accuracy", "loss") and part:
        return f"{quantity}/{part}"
    return name if name in ("learning_rate", "gradient_norm", "images_per_second") else f"loss/{name}"
