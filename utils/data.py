"""Batches on the device: the data set lies there as uint8; every step gathers, augments and normalizes there.

No worker processes, no PIL, no copy from the host during an epoch. Order and augmentation of the images derive from
(seed, epoch) and the position in the epoch, so that several processes split the same epoch.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from utils import augment, distributed, seeds
from utils.datasets import Dataset
from utils.errors import UserError
from utils.params import AUGMENTATIONS, DataParams, Params

MAX_ROTATION = 20.0  # degrees, in either direction


@dataclass(frozen=True)
class Images:
    """Part of a data set on the device: uint8 images (N, H, W, 3), int64 labels (N,), mean and std (3,)."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def batch_size(self) -> int:
        """Batch size for inference: large enough to fill a GPU, small enough for the caches of a CPU."""
        pixels = (1024 if self.labels.is_cuda else 256) * 32**2
        return max(1, pixels // self.images.shape[1] ** 2)


class Batch(NamedTuple):
    """Batch of a training step. In a loop of your own, `Batch(images)` or `Batch(images, labels)` is enough.

    images: float32 (B, 3, H, W); channels last in a run.
    labels: int64 (B,); None (default) for a thief without labels.
    index: int64 (B,), positions of the images in the training set; None (default) if no table of answers is looked up.
    epoch: float32 (), counted from 0; a tensor, since a recorded step reads its current value. Default: infinity, past
        every warm-up, since at epoch 0 some methods ignore the answers.
    """

    images: Tensor
    labels: Tensor = None  # type: ignore[assignment]
    index: Tensor = None  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor = torch.tensor(math.inf)  # on the CPU: operations accept a scalar from there on any device

    def without_labels(self) -> Batch:
        """The batch without labels."""
        return self._replace(labels=None)  # type: ignore[arg-type]

    def look_up(self, table: Tensor) -> Tensor:
        """Rows (B, C) of a table (N, C) over the training images. Raises ValueError if the batch has no index."""
        if self.index is None:  # table[None] would be the whole table
            raise ValueError("the batch has no index: pass the positions of its images in the training set, "
                             "Batch(images, labels, index)")
        return table[self.index]


# Augmentation parameters of a batch, each (B,): `index` and, depending on the augmentation, `flip`, `top`, `left` or
# `angle`; and `epoch` ().
Draw = dict[str, Tensor]


def split(dataset: Dataset, params: Params, device: torch.device) -> dict[str, Images]:
    """Split a data set into `test`, `train` (for stages that train on data) and, if images are held out, `validation`.
    Raises UserError if a part is empty."""
    parts = {"test": (dataset.test_images, dataset.test_labels)}
    if isinstance(params, DataParams):
        parts |= _training_parts(dataset, params)
    if empty := [name for name, (_, labels) in parts.items() if not len(labels)]:
        held_out = empty[0] == "train" and len(dataset.train_labels)
        raise UserError(f"{dataset.name}: the {empty[0]} part has no images"
                        + ', "validation_fraction" holds all of them out' * bool(held_out))
    mean, std = (torch.tensor(values, device=device) for values in (params.mean or dataset.mean,
                                                                    params.std or dataset.std))
    return {name: Images(x.to(device), y.to(device), mean, std) for name, (x, y) in parts.items()}


def _training_parts(dataset: Dataset, params: DataParams) -> dict[str, tuple[Tensor, Tensor]]:
    images, labels = dataset.train_images, dataset.train_labels
    index = training_index(dataset, params)
    if len(index) == 1 and len(index["train"]) == len(labels):  # all images: no copy
        return {"train": (images, labels)}
    return {name: (images[chosen], labels[chosen]) for name, chosen in index.items()}


def training_index(dataset: Dataset, params: DataParams) -> dict[str, Tensor]:
    """Indices of the training images in `train` and, if images are held out, `validation`. A group of near copies is
    held out as a whole, since copies of training images would inflate the accuracy. Raises UserError if the parameters
    ask for more images than there are."""
    count = len(dataset.train_labels)
    index = torch.arange(count)
    if params.subset_size is not None and params.subset_size > count:
        raise UserError(f'"subset_size" is {params.subset_size}, but {dataset.name} has {count} training images')
    if params.subset_size is not None or params.subset_fraction < 1:
        index = _draw_subset(index, params.subset_size or max(1, round(params.subset_fraction * count)), count)
    parts = _held_out(index, dataset, params) if params.validation_fraction else {"train": index}
    budget = getattr(params, "query_budget", None)
    if budget is not None and budget > len(parts["train"]):
        raise UserError(f'"query_budget" is {budget}, but there are {len(parts["train"])} training images')
    if budget is not None:
        parts["train"] = _draw_subset(parts["train"], budget, count)
    return parts


def _draw_subset(index: Tensor, size: int, count: int) -> Tensor:
    """Draw `size` images of `index` by a fixed order of all `count` images: smaller draws lie in larger ones."""
    position = torch.randperm(count, generator=seeds.generator("subset")).argsort()
    return index[position[index].argsort()[:size]].sort().values


def _held_out(index: Tensor, dataset: Dataset, params: DataParams) -> dict[str, Tensor]:
    """Split the images in `index` into `train` and `validation`."""
    names, group = (index if dataset.train_groups is None else dataset.train_groups[index]).unique(return_inverse=True)
    shuffled = torch.randperm(len(names), generator=seeds.generator(params.seed, "validation"))
    position = shuffled.argsort()[group]  # of each image's group in the random order
    order = position.argsort(stable=True)
    min_count = max(1, round(params.validation_fraction * len(index)))
    held_out = int((position <= position[order[min_count - 1]]).sum())
    return {"validation": index[order[:held_out]], "train": index[order[held_out:]]}


def chosen_augmentation(dataset: Dataset, params: Params) -> str | None:
    """Augmentation for `TrainBatches`, from the parameter `augmentation` or, for stages without, of the data set."""
    chosen = getattr(params, "augmentation", True)
    if chosen in AUGMENTATIONS:
        return AUGMENTATIONS[chosen].recipe
    return dataset.augmentation if chosen else None


class TrainBatches:
    """Batches of the training images of a run, with a new permutation and new augmentation in each epoch.

    `augmentation`: `crop` (random crop after padding by an eighth of the image, 4 pixels of 32), `crop_flip` (random
    crop and horizontal flip), `rotate_flip` (rotation by up to 20 degrees and flip) or None. Raises UserError if there
    are too few images.
    """

    def __init__(self, part: Images, batch_size: int, augmentation: str | None, seed: int) -> None:
        self.part, self.batch_size, self.augmentation, self.seed = part, batch_size, augmentation, seed
        self._size = part.images.shape[1]
        self._padding = self._size // 8
        self._crops = augmentation in ("crop", "crop_flip")
        self._flips = augmentation in ("crop_flip", "rotate_flip")
        self._pixels = augment.pad(part.images, self._padding) if self._crops else part.images
        if batch_size < distributed.world_size():
            raise UserError(f"a batch of {batch_size} images cannot be shared by {distributed.world_size()} processes")
        # Batch statistics need two images, and every process needs one: a smaller last batch is dropped.
        remainder = len(part) % batch_size
        self.usable = len(part) - (remainder if remainder < max(2, distributed.world_size()) else 0)
        if not self.usable:
            raise UserError(f"{len(part)} training images are too few, at least {max(2, distributed.world_size())} are "
                            "needed")

    def __len__(self) -> int:
        return -(-self.usable // self.batch_size)

    def batch_sizes(self) -> list[int]:
        """Number of images of each step over all processes; the last may be smaller."""
        return [min(self.batch_size, self.usable - start) for start in range(0, self.usable, self.batch_size)]

    def full_draw(self, epoch: int) -> Draw:
        """Augmentation parameters of all images in an epoch, a dropped last batch included, on the CPU; no `epoch`."""
        return self._draw(epoch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Iterate over this process's share of each batch."""
        return map(self.gather, self.draws(epoch, self.part.labels.device))

    def draws(self, epoch: int, device: torch.device) -> list[Draw]:
        """Augmentation parameters of each batch of an epoch: this process's share, on the device."""
        draw = {name: values.to(device, non_blocking=True) for name, values in self._draw(epoch).items()}
        current_epoch = torch.tensor(float(epoch), device=device)
        rank, ranks = distributed.rank(), distributed.world_size()
        shares, start = [], 0
        for size in self.batch_sizes():
            share = slice(start + size * rank // ranks, start + size * (rank + 1) // ranks)
            shares.append({name: values[share] for name, values in draw.items()} | {"epoch": current_epoch})
            start += size
        return shares

    @property
    def views(self) -> int | None:
        """Number of different views of an image; None if unbounded (rotation)."""
        shifts = (2 * self._padding + 1) ** 2
        return {None: 1, "crop": shifts, "crop_flip": 2 * shifts}.get(self.augmentation)

    def view(self, draw: Draw) -> Tensor:
        """Number of each image's view, int64 (B,), from 0 to `views` - 1."""
        if not self.augmentation:
            return torch.zeros_like(draw["index"])
        shift = draw["top"] * (2 * self._padding + 1) + draw["left"]
        return shift * 2 + draw["flip"] if self._flips else shift

    def _draw(self, epoch: int) -> Draw:
        """Draw on the CPU, so that the result is equal on every device."""
        random = seeds.generator(self.seed, "epoch", epoch)
        count = len(self.part)
        draw = {"index": torch.randperm(count, generator=random)}
        if self._flips:
            draw["flip"] = torch.rand(count, generator=random) < 0.5
        if self._crops:
            draw["top"] = torch.randint(2 * self._padding + 1, (count,), generator=random)
            draw["left"] = torch.randint(2 * self._padding + 1, (count,), generator=random)
        elif self.augmentation == "rotate_flip":
            draw["angle"] = (torch.rand(count, generator=random) * 2 - 1) * MAX_ROTATION
        return draw

    def gather(self, draw: Draw) -> Batch:
        """Gather, augment and normalize a batch on the device."""
        if self.augmentation == "crop":
            images = augment.crop(self._pixels, draw["index"], draw["top"], draw["left"], self._size)
        elif self.augmentation == "crop_flip":
            images = augment.crop_flip(self._pixels, draw["index"], draw["top"], draw["left"], draw["flip"], self._size)
        elif self.augmentation == "rotate_flip":
            images = augment.rotate_flip(self._pixels, draw["index"], draw["angle"], draw["flip"])
        else:
            images = self._pixels[draw["index"]]
        images = augment.normalize(images, self.part.mean, self.part.std)
        return Batch(images, self.part.labels[draw["index"]], draw["index"], draw["epoch"])


def in_order(part: Images, *, all_ranks: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over this process's share of a part (or all of it) in order, without augmentation: normalized images
    (B, 3, H, W) and labels (B,)."""
    batch_size = part.batch_size
    rank, ranks = (0, 1) if all_ranks else (distributed.rank(), distributed.world_size())
    share = range(len(part) * rank // ranks, len(part) * (rank + 1) // ranks)
    for start in share[::batch_size]:
        stop = min(start + batch_size, share.stop)
        yield augment.normalize(part.images[start:stop], part.mean, part.std), part.labels[start:stop]
