"""The images that a run has made so far, as a training set."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor

from datafree.distiller import DataSpec
from utils.data import Images, TrainBatches


class ImagePool:
    """Images as uint8, all of which a student may be shown."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        size, device = spec.image_size, spec.mean.device
        self.images = torch.empty(0, size, size, 3, dtype=torch.uint8, device=device)
        self.labels = torch.empty(0, dtype=torch.int64, device=device)  # what each was made to be taken for

    def add(self, pixels: Tensor, labels: Tensor) -> None:
        """Keep images (B, 3, H, W) of pixels in [0, 1], cut to 8 bits, made for the classes `labels` (B,)."""
        quantized = (pixels * 255 + 1e-3).byte()  # what rounding took from a whole number is not to cost a grey level
        self.images = torch.cat([self.images, quantized.permute(0, 2, 3, 1).contiguous()])
        self.labels = torch.cat([self.labels, labels])

    def batches(self, num_batches: int, batch_size: int, random: torch.Generator) -> Iterator[Tensor]:
        """`num_batches` batches of `batch_size` images as networks see them, augmented, (B, 3, H, W): the pool in
        random order, again and again. A pool that is smaller than a batch is a batch."""
        part = Images(self.images, self.labels, self.spec.mean, self.spec.std)
        seed = int(torch.randint(2**31, (), generator=random))
        batches = TrainBatches(part, min(batch_size, len(self.images)), self.spec.augmentation, seed)
        epochs = map(batches.epoch, count())
        return (batch.images for batch in islice((batch for epoch in epochs for batch in epoch), num_batches))

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images, self.labels = (state[name].to(self.images.device) for name in ("images", "labels"))
