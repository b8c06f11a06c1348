"""Cache of a frozen network's logits across epochs and runs.

Random crop (shifts of up to p pixels) and flip give 2 (2p + 1)^2 views of an image, 162 for 32x32 pixels (half as many
without flip), and a frozen network maps each view to fixed logits. The logits over the training images thus form a
table of at most N x 162 rows, stored in a file that runs with equal network and images share. Missing rows are
computed in batches before an epoch; the steps look them up. Runs with equal seeds draw equal views, so the second run
computes none.
"""
from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils import distributed
from utils.console import progress_bar
from utils.data import Draw, TrainBatches
from utils.step import autocast


class TeacherCache:
    """Table of the logits of one frozen network over the training images of a run.

    The file is sparse: 50,000 images take up to 360 MB for 10 classes in float32, and 3.3 GB for 100 classes. Each row
    ends with a checksum, so missing or incomplete rows are computed again. If the file cannot be used, logits are
    computed without it.

    Networks with equal weights may differ in their code or options. The file therefore ends with the logits of a few
    images (the probe) of the network that filled it. A network with other logits leaves the file unchanged and gets a
    file of its own.
    """

    FORMAT = 3  # version of the file format
    CHECKSUM = 4  # bytes
    PROBE = 16  # images

    def __init__(self, network: nn.Module, sha256: str, num_classes: int, batches: TrainBatches, dtype: torch.dtype,
                 directory: Path | None, log: Callable[[str], None]) -> None:
        """network: frozen, in eval mode. sha256: that of its checkpoint. directory: place of the file, which needs an
        augmentation with a finite number of views (ValueError); None: keep the logits of one epoch in memory."""
        if directory and batches.views is None:
            raise ValueError(f"{batches.augmentation} makes an unlimited number of views")
        self.network, self.batches, self.dtype, self._log = network, batches, dtype, log
        self.views = batches.views or 1
        self.device = batches.part.labels.device
        self.shape = (len(batches.part) * self.views, num_classes)
        self._width = num_classes * dtype.itemsize + self.CHECKSUM  # bytes of a row
        self._readable = self._writable = directory is not None
        self._logged = directory is None
        # Logits (N, C) of this epoch's view of each training image, filled in place: a recorded step reads this tensor.
        self.logits = torch.zeros(len(batches.part), num_classes, dtype=dtype, device=self.device)
        if directory:
            self.path = self._open(directory, f"teacher-{self._key(sha256)}")

    def _open(self, directory: Path, name: str) -> Path:
        """Find the first file whose probe matches this network, or create a file."""
        probe = self._probe()
        for number in itertools.count(1):
            path = directory / f"{name}{f'-{number}' * (number > 1)}.logits"
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stored = self._stored_probe(path, len(probe))
                if stored is not None and _allclose(stored, probe):
                    break
                if stored is not None:
                    self._log(f"teacher_cache: {path} is not used, it is of a network with equal weights but other "
                              "logits")
                    continue
                with open(path, "wb") as file:  # a file without a probe is not trusted
                    file.seek(self.shape[0] * self._width)
                    file.write(b"".join(content + _checksum(content) for content in map(_content, probe)))
            except OSError as error:
                self._stop_writing(path, error)
                self._readable = False
            break
        return path

    def _probe(self) -> Tensor:
        """Logits (P, C) of one view of the first images."""
        index = torch.arange(min(self.PROBE, len(self.batches.part)))
        like = self.batches.draws(0, torch.device("cpu"))[0]
        view = {name: torch.zeros(len(index), dtype=values.dtype) for name, values in like.items() if name != "epoch"}
        return self._compute({**view, "index": index}).cpu()

    def _stored_probe(self, path: Path, count: int) -> Tensor | None:
        """Logits (count, C) at the end of a file; None if they are missing or damaged."""
        try:
            with open(path, "rb") as file:
                file.seek(self.shape[0] * self._width)
                rows = [file.read(self._width) for _ in range(count)]
        except FileNotFoundError:
            return None
        values = [row[:-self.CHECKSUM] for row in rows]
        if any(len(row) < self._width or _checksum(row[:-self.CHECKSUM]) != row[-self.CHECKSUM:] for row in rows):
            return None
        return torch.frombuffer(bytearray(b"".join(values)), dtype=self.dtype).view(count, -1)

    def start_epoch(self, epoch: int) -> None:
        """Provide the logits of all images in their views of an epoch, counted from 0."""
        draws = self.batches.draws(epoch, torch.device("cpu"))
        self._fill({name: torch.cat([share[name] for share in draws]) for name in draws[0] if name != "epoch"}, epoch)

    def fill(self, epoch: int) -> Tensor:
        """Logits (N, C) of all images in their views of an epoch, a dropped last batch included. Processes share the
        work."""
        draw, ranks = self.batches.full_draw(epoch), distributed.world_size()
        self.logits.zero_()
        self._fill({name: values[distributed.rank()::ranks] for name, values in draw.items()}, epoch)
        distributed.sum_over_ranks(self.logits)
        return self.logits

    def _fill(self, draw: Draw, epoch: int) -> None:
        rows = draw["index"] * self.views + (self.batches.view(draw) if self.batches.views else 0)
        logits, known = self._read(rows)
        missing = (~known).nonzero().flatten()
        if not self._logged:
            self._log(f"teacher_cache: {self.path} has {len(rows) - len(missing)} of the {len(rows)} logits of "
                      f"epoch {epoch + 1}")
            self._logged = True
        if len(missing):
            logits[missing] = self._compute({name: values[missing] for name, values in draw.items()}).cpu()
            self._write(rows[missing], logits[missing])
        self.logits[draw["index"].to(self.device)] = logits.to(self.device)

    def _compute(self, draw: Draw) -> Tensor:
        """Compute logits in batches of one size (the last is padded), since other sizes round differently and would be
        tuned separately on a GPU."""
        count, size, parts = len(draw["index"]), self.batches.part.batch_size, []
        with progress_bar(count, "frozen network") as bar:
            for start in range(0, count, size):
                chosen = torch.arange(start, start + size).clamp_(max=count - 1)
                share = {name: values[chosen].to(self.device) for name, values in draw.items()}
                images = self.batches.gather({**share, "epoch": torch.zeros((), device=self.device)}).images
                with autocast(self.device, self.dtype), torch.inference_mode():
                    logits = self.network(images)
                parts.append(logits.to(self.dtype))
                bar.update(min(size, count - start))
        return torch.cat(parts)[:count]

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of rows (B,), and a mask (B,) of the stored ones."""
        content = np.zeros((len(rows), self._width - self.CHECKSUM), np.uint8)
        known = np.zeros(len(rows), bool)
        if self._readable:
            try:
                with open(self.path, "rb", buffering=0) as file:
                    for number, row in enumerate(rows.tolist()):  # pread, not mmap, where an I/O error is a SIGBUS
                        stored = os.pread(file.fileno(), self._width, row * self._width)
                        values = stored[:-self.CHECKSUM]
                        if len(stored) == self._width and _checksum(values) == stored[-self.CHECKSUM:]:
                            content[number], known[number] = np.frombuffer(values, np.uint8), True
            except OSError as error:
                self._log(f"teacher_cache: {self.path} cannot be read ({error.strerror})")
                self._readable = self._writable = False
        return torch.from_numpy(content).view(self.dtype), torch.from_numpy(known)

    def _write(self, rows: Tensor, logits: Tensor) -> None:
        if not self._writable:
            return
        try:
            with open(self.path, "r+b", buffering=0) as file:
                for row, content in zip(rows.tolist(), map(_content, logits), strict=True):
                    os.pwrite(file.fileno(), content + _checksum(content), row * self._width)
        except OSError as error:
            self._stop_writing(self.path, error)

    def _stop_writing(self, path: Path, error: OSError) -> None:
        self._log(f"teacher_cache: {path} cannot be written ({error.strerror}): new logits are not cached")
        self._writable = False

    def _key(self, sha256: str) -> str:
        """Hash of everything that the logits depend on except for the code of the network."""
        part = self.batches.part
        fields = [self.FORMAT, sha256, str(self.network), self.dtype, self.device.type, str(torch.__version__),
                 self.batches.augmentation, self.shape, part.mean.tolist(), part.std.tolist()]
        digest = hashlib.sha256(repr(fields).encode())
        digest.update(part.images.cpu().numpy().data)
        return digest.hexdigest()[:16]


def _content(logits: Tensor) -> bytes:
    return logits.contiguous().view(torch.uint8).numpy().tobytes()


def _allclose(stored: Tensor, computed: Tensor) -> bool:
    """Whether logits differ by rounding at most, which includes other kernels and TensorFloat-32."""
    tolerance = max(4 * torch.finfo(stored.dtype).eps, 2e-3)  # of the root mean square
    one, other = stored.double().nan_to_num(), computed.double().nan_to_num()
    return bool((one - other).square().mean() <= tolerance**2 * other.square().mean())


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(TeacherCache.CHECKSUM, "little")
