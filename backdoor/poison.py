"""Poisoned training sets: which images get the trigger, and what becomes of their labels."""
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
    """A training set in its order, some of its images stamped."""

    images: Tensor  # uint8 (N, 32, 32, 3)
    labels: Tensor  # int64 (N,)
    index: Tensor  # int64 (n,), ascending: which images were stamped


def choose(labels: Tensor, *, target: int, rate: float, clean_label: bool, holdout: float, seed: int) -> Tensor:
    """Which training images are poisoned: int64 (n,), ascending, on the device of the labels.

    The data set is put into a random order first, so that one ordered by class is poisoned in all classes. The last
    int(holdout * N) images of that order stay clean; of the others, the first int(rate * N) that qualify are taken,
    or all if fewer do: images of the target class if `clean_label`, and of all other classes if not.

    Args:
        labels: int64 (N,).
        target: the class that the trigger shall lead to.
        rate: poisoned images in parts of all N.
        holdout: images that stay clean in any case, in parts of all N.
        seed: of the order.

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
    """Stamp the images that `choose` names and, unless the trigger leaves labels as they are, label them `target`.

    Args:
        images: uint8 (N, 32, 32, 3); stays as it is.
        labels: int64 (N,), on the same device; stays as it is.
        replacements: uint8 (n, 32, 32, 3), stamped in place of the chosen images, in the order of their index: the
            adversarial images of `cl`.

    Raises:
        UserError: no image qualifies; images that are not 32x32.
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
