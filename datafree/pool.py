"""Training set of the synthetic images of a run."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor

from datafree.distiller import DataSpec
from utils.data import Images, TrainBatches


class ImagePool:
    """All synthetic images so far, as uint8."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        size, device = spec.image_size, spec.mean.device
        self.images = torch.empty(0, size, size, 3, dtype=torch.uint8, device=device)
        self.labels = torch.empty(0, dtype=torch.int64, device=device)  # target class of each image

    def add(self, pixels: Tensor, labels: Tensor) -> None:
        """Add images (B, 3, H, W) with pixels in [0, 1], truncated to 8 bits, and their target classes (B,)."""
        quantized = (pixels * 255 + 1e-3).byte()  # a rounding error must not cost a gray level
        self.images = torch.cat([self.images, quantized.permute(0, 2, 3, 1).contiguous()])
        self.labels = torch.cat([self.labels, labels])

    def batches(self, num_batches: int, batch_size: int, random: torch.Generator) -> Iterator[Tensor]:
        """Iterate over `num_batches` batches of normalized, augmented images (batch_size, 3, H, W). Each pass over the
        pool has a new random order. If the pool is smaller than `batch_size`, each batch is the pool."""
        part = Images(self.images, self.labels, self.spec.mean, self.spec.std)
        seed = int(torch.randint(2**31, (), generator=random))
        batches = TrainBatches(part, min(batch_size, len(self.images)), self.spec.augmentation, seed)
        epochs = map(batches.epoch, count())
        return (batch.images for batch in islice((batch for epoch in epochs for batch in epoch), num_batches))

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images, self.labels = (state[name].to(self.images.device) for name in ("images", "labels"))
