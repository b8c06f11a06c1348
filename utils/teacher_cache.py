"""Logits of a frozen network, remembered across epochs and runs.

Random crop (shifts of up to p pixels) and flip make 2 (2p + 1)^2 views of an image, 162 of 32x32, and a frozen network
answers each always alike. So its logits over the training images are a table: at most N x 162 rows, one for each view
that some epoch drew, in a file that runs on the same network and images share. Before an epoch the rows that it lacks
are computed, in batches; its steps then look them up. Runs of one seed draw the same views: the second computes none.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.data import Draw, TrainBatches
from utils.errors import UserError
from utils.step import autocast
from utils.training import Frozen, progress_bar


class TeacherCache:
    """The table of one frozen network over the training images of a run.

    The file is sparse: it takes the room of the rows that were written. A row without a zero is one that was computed;
    a row that is not there, or was half written when the machine failed, has zeros and is computed again.
    """

    def __init__(self, frozen: Frozen, sha256: str, num_classes: int, batches: TrainBatches, dtype: torch.dtype,
                 directory: Path, say: Callable[[str], None]) -> None:
        """sha256: of the frozen network's checkpoint. batches: with a finite number of views. Raises UserError if there
        can be no file in the directory."""
        self.frozen, self.batches, self.dtype, self.say = frozen, batches, dtype, say
        self.device = batches.part.labels.device
        self.shape = (len(batches.part) * batches.views, num_classes)
        self.path = directory / f"teacher-{self._key(sha256)}.logits"
        self.width = num_classes * dtype.itemsize  # bytes of a row
        self.grows = True
        frozen.remembered = torch.zeros(len(batches.part), num_classes, dtype=dtype, device=self.device)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self.shape[0] * self.width)  # of the same size if it was there
        except OSError as error:
            raise UserError(f"teacher_cache: {self.path}: {error.strerror}") from None

    def start_epoch(self, epoch: int) -> None:
        """Have the logits of all images, each in its view of this epoch (counted from 0), ready for the steps."""
        draws = self.batches.draws(epoch, torch.device("cpu"))
        draw = {name: torch.cat([share[name] for share in draws]) for name in draws[0]}
        rows = draw["index"] * self.batches.views + self.batches.view(draw)
        logits = self._read(rows)
        missing = (logits == 0).any(dim=1).nonzero().flatten()
        if len(missing):
            logits[missing] = self._compute({name: values[missing] for name, values in draw.items()}).cpu()
            self._write(rows[missing], logits[missing])
        self.frozen.remembered[draw["index"].to(self.device)] = logits.to(self.device)

    def _compute(self, draw: Draw) -> Tensor:
        size, parts = self.batches.batch_size, []
        with progress_bar(len(draw["index"]), "frozen network") as bar:
            for start in range(0, len(draw["index"]), size):
                share = {name: values[start:start + size].to(self.device) for name, values in draw.items()}
                with autocast(self.device, self.dtype):
                    parts.append(self.frozen.answer(self.batches.make(share).images).to(self.dtype))
                bar.update(len(parts[-1]))
        return torch.cat(parts)

    def _read(self, rows: Tensor) -> Tensor:
        table = np.memmap(self.path, np.uint8, "r", shape=(self.shape[0], self.width))
        return torch.from_numpy(table[rows.numpy()]).view(self.dtype)

    def _write(self, rows: Tensor, logits: Tensor) -> None:
        """Row by row, not through a mapping: a disk that is full then is an error and no signal."""
        if not self.grows:
            return
        content = logits.contiguous().view(torch.uint8).numpy()
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for row, values in zip(rows.tolist(), content, strict=True):
                    os.pwrite(file.fileno(), values.tobytes(), row * self.width)
        except OSError as error:
            self.say(f"teacher_cache: {self.path} grows no further ({error.strerror})")
            self.grows = False

    def _key(self, sha256: str) -> str:
        """Of everything that the logits depend on."""
        part = self.batches.part
        facts = [sha256, self.dtype, self.batches.augmentation, self.shape, part.mean.tolist(), part.std.tolist()]
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(part.images.cpu().numpy().data)
        return digest.hexdigest()[:16]
