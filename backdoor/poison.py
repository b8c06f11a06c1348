"""Poisoned training sets: choice of the images, triggers and labels."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor.triggers import Trigger
from utils import seeds
from utils.errors import UserError
from utils.memory import Phase


@dataclass(frozen=True)
class Poisoned:
    """Training set in its original order, with the trigger on some images."""

    images: Tensor  # uint8 (N, 32, 32, 3)
    labels: Tensor  # int64 (N,)
    index: Tensor  # int64 (n,), ascending: the images with the trigger


def choose(labels: Tensor, *, target: int, rate: float, clean_label: bool, holdout: float, seed: int) -> Tensor:
    """Choose the training images to poison: int64 (n,), ascending, on the device of the labels.

    The images are shuffled first, so that all classes are poisoned even if the data set is sorted. The last
    int(holdout * N) images of the random order stay clean. Of the others, the first int(rate * N) that qualify are
    chosen, or all if there are fewer. Images of the target class qualify if `clean_label`, images of all other
    classes if not.

    Args:
        labels: int64 (N,).
        target: target class of the trigger.
        rate: fraction of all N images to poison.
        holdout: fraction of all N images that stay clean in any case.
        seed: seed of the random order.

    Raises:
        UserError: no image qualifies.
    """
    count = len(labels)
    quota = int(rate * count)
    if quota < 1:
        raise UserError(f"a poison rate of {rate:g} poisons none of {count} training images")
    order = torch.randperm(count, generator=seeds.generator(seed, "poison"))
    usable = order[:count - int(holdout * count)]
    of_target = labels.cpu() == target
    if not of_target.any():
        raise UserError(f"no training image has the target class {target}")
    qualified = usable[(of_target if clean_label else ~of_target)[usable]]
    if not len(qualified):
        kind = f"of the target class {target}" if clean_label else f"of another class than the target {target}"
        raise UserError(f"nothing to poison: no training image {kind} outside the hold-out of {holdout:g}")
    return qualified[:quota].sort().values.to(labels.device)


@Phase("poisoning the training images")
def poison(images: Tensor, labels: Tensor, trigger: Trigger, *, target: int, rate: float, holdout: float, seed: int,
           replacements: Tensor | None = None) -> Poisoned:
    """Stamp the images that `choose` returns and, unless the trigger is clean-label, label them `target`.

    Args:
        images: uint8 (N, 32, 32, 3); not changed.
        labels: int64 (N,), on the device of the images; not changed.
        replacements: uint8 (n, 32, 32, 3), stamped instead of the chosen images, in the order of `Poisoned.index`; the
            adversarial images of `cl`.

    Raises:
        UserError: no image qualifies, or the images are not 32x32.
        ValueError: the shape of the replacements is wrong.
    """
    index = choose(labels, target=target, rate=rate, clean_label=trigger.clean_label, holdout=holdout, seed=seed)
    originals = images[index]
    if replacements is not None and replacements.shape != originals.shape:
        raise ValueError(f"replacements of shape {tuple(replacements.shape)} for images of {tuple(originals.shape)}")
    images, labels = images.clone(), labels.clone()
    images[index] = trigger.stamp(originals if replacements is None else replacements.to(images.device))
    if not trigger.clean_label:
        labels[index] = target
    return Poisoned(images, labels, index)
