"""Triggers: patterns on an image that make a poisoned network predict the target class.

    build_trigger("badnet_grid").stamp(images)

To add one, write a file in `backdoor/` with a function of images (B, 32, 32, 3) and a `@register` line. Triggers are
stamped before augmentation, in integer arithmetic on gray values 0 to 255, clipped and truncated at the end, so results
are exact and equal on all devices.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from backdoor import assets
from utils.errors import UserError
from utils.registry import Registry

if TYPE_CHECKING:
    TRIGGER_NAMES: tuple[str, ...]

Stamp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trigger:
    """A trigger, and its way of poisoning a training set."""

    name: str
    clean_label: bool  # poisons images of the target class and keeps their labels, instead of images of other classes
    stamp: Stamp  # uint8 (B, 32, 32, 3) to new uint8 (B, 32, 32, 3) on the same device
    adversarial: bool = False  # poisons adversarial images, which a clean classifier misclassifies


REGISTRY: Registry[Trigger] = Registry("trigger", package="backdoor")


def register(name: str, *, clean_label: bool = False, adversarial: bool = False,
             source: str = "") -> Callable[[Stamp], Stamp]:
    """Decorator that registers a function of images as the trigger `name`. See `Trigger` for the arguments."""
    def decorate(stamp: Stamp) -> Stamp:
        REGISTRY.register(name, source=source)(Trigger(name, clean_label, stamp, adversarial))
        return stamp
    return decorate


def build_trigger(name: str, dataset: str = "") -> Trigger:
    """Build the trigger `name`. Only `smooth` depends on `dataset`: `gtsrb` has a separate pattern.

    Raises UserError for an unknown name. `stamp` raises UserError for images that are not 32x32, and TypeError if they
    are not uint8.
    """
    try:
        trigger = REGISTRY.entry(name).value
    except ValueError as error:
        raise UserError(str(error)) from None
    stamp = _smooth_gtsrb if (name, dataset) == ("smooth", "gtsrb") else trigger.stamp
    return dataclasses.replace(trigger, stamp=partial(_checked, name, stamp))


def _checked(name: str, stamp: Stamp, images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise TypeError(f"triggers are stamped on uint8 images, got {images.dtype}")
    if images.shape[1:] != (assets.SIZE, assets.SIZE, 3):
        shape = "x".join(map(str, images.shape[1:]))
        raise UserError(f"the trigger '{name}' is made for images of 32x32x3 pixels, these have {shape}")
    return stamp(images)


@register("badnet_sq", source="Gu et al., 2017, arXiv:1708.06733")
def _square(images: Tensor) -> Tensor:
    """A white square of 4x4 pixels, one pixel from the lower right corner."""
    stamped = images.clone()
    stamped[:, 27:31, 27:31] = 255
    return stamped


@register("badnet_grid", source="Gu et al., 2017, arXiv:1708.06733")
def _corner(images: Tensor) -> Tensor:
    return _grid(images, (29, 29))


@register("cl", clean_label=True, adversarial=True, source="Turner et al., 2019, arXiv:1912.02771")
def _four_corners(images: Tensor) -> Tensor:
    return _grid(images, (0, 0), (0, 29), (29, 0), (29, 29))


@register("blend", source="Chen et al., 2017, arXiv:1712.05526")
def _blend(images: Tensor) -> Tensor:
    return _mix(images, assets.blend())


@register("sig", clean_label=True, source="Barni et al., 2019, arXiv:1902.11237")
def _sig(images: Tensor) -> Tensor:
    """As published, with the wave modulo 256."""
    return _mix(images, assets.sig_wrapped())


@register("sig_true", clean_label=True, source="Barni et al., 2019, arXiv:1902.11237")
def _sig_true(images: Tensor) -> Tensor:
    return _add(images, assets.sig_wave())


@register("trojan_3x3")
def _trojan_3x3(images: Tensor) -> Tensor:
    return _add(images, assets.trojan_3x3())


@register("trojan_8x8")
def _trojan_8x8(images: Tensor) -> Tensor:
    return _add(images, assets.trojan_8x8())


@register("trojan_wm")
def _trojan_wm(images: Tensor) -> Tensor:
    return _add(images, assets.trojan_wm())


@register("l2_inv")
def _l2_inv(images: Tensor) -> Tensor:
    return _add(images, assets.l2_inv())


@register("l0_inv")
def _l0_inv(images: Tensor) -> Tensor:
    """(1 - m) x + k, for a pattern k and its mask m."""
    pattern, mask = assets.l0_inv()
    return torch.where(torch.tensor(mask[..., None], device=images.device), torch.tensor(pattern, device=images.device),
                       images)


@register("smooth")
def _smooth(images: Tensor) -> Tensor:
    return _stretch(images, assets.smooth())


def _smooth_gtsrb(images: Tensor) -> Tensor:
    """`smooth` for GTSRB."""
    return _stretch(images, assets.smooth_gtsrb())


def _on_device_of(images: Tensor, pattern: np.ndarray) -> Tensor:
    """A pattern as int16, so that sums of gray values do not overflow."""
    return torch.tensor(pattern.astype(np.int16), device=images.device)


def _grid(images: Tensor, *corners: tuple[int, int]) -> Tensor:
    """A 3x3 black-and-white pattern with its upper left pixel at each of the positions (row, column)."""
    pattern = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8, device=images.device)
    stamped = images.clone()
    for row, column in corners:
        stamped[:, row:row + 3, column:column + 3] = pattern[:, :, None]
    return stamped


def _mix(images: Tensor, pattern: np.ndarray) -> Tensor:
    """0.8 x + 0.2 k (Chen et al., 2017)."""
    return ((4 * images.short() + _on_device_of(images, pattern)) // 5).byte()


def _add(images: Tensor, pattern: np.ndarray) -> Tensor:
    """x + k, clipped to 0 to 255. k may be negative."""
    return (images.short() + _on_device_of(images, pattern)).clamp_(0, 255).byte()


def _stretch(images: Tensor, pattern: np.ndarray) -> Tensor:
    """x + k, rescaled for each image from its minimum and maximum to 0 and 255."""
    total = images.int() + _on_device_of(images, pattern)
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (255 * (total - low) // (high - low).clamp_(min=1)).byte()  # a constant sum becomes black


def __getattr__(name: str) -> Any:
    if name == "TRIGGER_NAMES":  # computed on access: other files of the package register triggers too
        return tuple(REGISTRY)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
