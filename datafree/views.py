"""Differentiable random views of images."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, random: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Shift each image (B, C, H, W) by up to `padding` pixels, zero-padded; with `flip`, mirror it half of the time."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=random)
    flipped = _random_flips(count, flip, random)
    rows = top + torch.arange(height)
    columns = left + torch.where(flipped[:, None], torch.arange(width).flip(0), torch.arange(width))
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_resized_crop(images: Tensor, random: torch.Generator, *, scale: tuple[float, float], flip: bool) -> Tensor:
    """Crop a random part of each image (B, C, H, W), resized bilinearly; with `flip`, mirror it half of the time.

    scale: range of the uniform area of the crop, as a fraction of the image. The aspect ratio is log-uniform in
    (3/4, 4/3), clipped to the image.
    """
    count = len(images)
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=random)
    aspect = ((2 * torch.rand(count, generator=random) - 1) * math.log(4 / 3)).exp()
    extent = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)  # of x and y, in images
    center = (1 - extent) * (2 * torch.rand(count, 2, generator=random) - 1)  # offset in half images
    sign = torch.where(_random_flips(count, flip, random), -1.0, 1.0)[:, None]
    height, width = images.shape[2:]
    across, down = (2 * (torch.arange(size) + 0.5) / size - 1 for size in (width, height))  # pixel centers in [-1, 1]
    x = (center[:, :1] + sign * extent[:, :1] * across)[:, None, :].expand(-1, height, -1)
    y = (center[:, 1:] + extent[:, 1:] * down)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], -1).to(images)  # not affine_grid, a matrix product in bfloat16 under autocast
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_roll(images: Tensor, random: torch.Generator, *, pixels: int, flip: bool) -> Tensor:
    """Roll all images (B, C, H, W) equally by up to `pixels` in each direction; with `flip`, mirror all or none."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=random).tolist()
    images = images.roll((down, across), (2, 3))
    return images.flip(3) if flip and torch.rand(1, generator=random).item() < 0.5 else images


def _random_flips(count: int, enabled: bool, random: torch.Generator) -> Tensor:
    """Mask of the images to mirror, bool (count,); all False unless `enabled`."""
    return (torch.rand(count, generator=random) < 0.5) & enabled
