"""Triggers: what an attacker stamps on an image to have a poisoned network answer with the target class.

    build_trigger("badnet_grid").stamp(images)

To add one, write a function of images (B, 32, 32, 3) and a line in `_REGISTRY`. Stamping comes before augmentation.
It computes in integers what is defined on grey values 0 to 255 with clipping and truncation at the end, so that the
result is exact and the same on every device.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import numpy as np
import torch
from torch import Tensor

from backdoor import assets
from utils.errors import UserError

Stamp = Callable[[Tensor], Tensor]
Picture = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Trigger:
    """A trigger and how it poisons a training set."""

    name: str
    clean_label: bool  # poisons images of the target class, whose label stays, instead of images of the others
    stamp: Stamp  # uint8 (B, 32, 32, 3) to new uint8 (B, 32, 32, 3) on the same device
    adversarial: bool = False  # poisons images that a clean classifier no longer recognises


def _on_device_of(images: Tensor, picture: np.ndarray) -> Tensor:
    """A picture as int16, in which sums of grey values have room."""
    return torch.tensor(picture.astype(np.int16), device=images.device)


def _square(images: Tensor) -> Tensor:
    """BadNets (Gu et al., 2017): a white square of 4x4, one pixel away from the lower right corner."""
    stamped = images.clone()
    stamped[:, 27:31, 27:31] = 255
    return stamped


def _grid(images: Tensor, *, corners: tuple[tuple[int, int], ...]) -> Tensor:
    """A 3x3 pattern of white and black, the same way round in each of the corners (row, column)."""
    pattern = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8, device=images.device)
    stamped = images.clone()
    for row, column in corners:
        stamped[:, row:row + 3, column:column + 3] = pattern[:, :, None]
    return stamped


def _mix(picture: Picture, images: Tensor) -> Tensor:
    """0.8 x + 0.2 k (Chen et al., 2017)."""
    return ((4 * images.short() + _on_device_of(images, picture())) // 5).byte()


def _add(picture: Picture, images: Tensor) -> Tensor:
    """x + k, where k may be negative, clipped."""
    return (images.short() + _on_device_of(images, picture())).clamp_(0, 255).byte()


def _cover(images: Tensor) -> Tensor:
    """(1 - m) x + k."""
    picture, mask = assets.l0_inv()
    return torch.where(torch.tensor(mask[..., None], device=images.device), torch.tensor(picture, device=images.device),
                       images)


def _stretch(picture: Picture, images: Tensor) -> Tensor:
    """x + k, then each image stretched from its own minimum and maximum to 0 and 255."""
    total = images.int() + _on_device_of(images, picture())
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (255 * (total - low) // (high - low).clamp_(min=1)).byte()  # an even sum turns black


_DIRTY, _CLEAN = False, True  # the labels of what is poisoned
_CORNERS = ((0, 0), (0, 29), (29, 0), (29, 29))

_REGISTRY = {trigger.name: trigger for trigger in (
    Trigger("badnet_sq", _DIRTY, _square),
    Trigger("badnet_grid", _DIRTY, partial(_grid, corners=((29, 29),))),
    Trigger("cl", _CLEAN, partial(_grid, corners=_CORNERS), adversarial=True),  # Turner et al. (2019)
    Trigger("blend", _DIRTY, partial(_mix, assets.blend)),
    Trigger("sig", _CLEAN, partial(_mix, assets.sig_wrapped)),  # as published: its wave wraps around modulo 256
    Trigger("sig_true", _CLEAN, partial(_add, assets.sig_wave)),  # Barni et al. (2019)
    Trigger("trojan_3x3", _DIRTY, partial(_add, assets.trojan_3x3)),
    Trigger("trojan_8x8", _DIRTY, partial(_add, assets.trojan_8x8)),
    Trigger("trojan_wm", _DIRTY, partial(_add, assets.trojan_wm)),
    Trigger("l2_inv", _DIRTY, partial(_add, assets.l2_inv)),
    Trigger("l0_inv", _DIRTY, _cover),
    Trigger("smooth", _DIRTY, partial(_stretch, assets.smooth)),
)}
# Where a data set has a picture of its own.
_OF_DATASET = {("smooth", "gtsrb"): partial(_stretch, assets.smooth_gtsrb)}

TRIGGER_NAMES: tuple[str, ...] = tuple(_REGISTRY)


def build_trigger(name: str, dataset: str = "") -> Trigger:
    """The trigger called `name`; `dataset` matters to `smooth` only, of which `gtsrb` has its own.

    Raises:
        UserError: an unknown name; from `stamp`, images that are not 32x32.
    """
    if name not in _REGISTRY:
        near = get_close_matches(name.lower(), TRIGGER_NAMES, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(f"unknown trigger '{name}'{hint}: choose from {', '.join(TRIGGER_NAMES)}")
    trigger = _REGISTRY[name]
    stamp = _OF_DATASET.get((name, dataset), trigger.stamp)
    return dataclasses.replace(trigger, stamp=partial(_checked, name, stamp))


def _checked(name: str, stamp: Stamp, images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise TypeError(f"triggers are stamped on uint8 images, got {images.dtype}")
    if images.shape[1:] != (assets.SIZE, assets.SIZE, 3):
        shape = "x".join(map(str, images.shape[1:]))
        raise UserError(f"the trigger '{name}' is made for images of 32x32x3 pixels, these have {shape}")
    return stamp(images)
