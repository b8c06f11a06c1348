"""Random views of images through which gradients pass."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, random: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Each image (B, C, H, W) moved by up to `padding` pixels over a zero border and, every other one, mirrored."""
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
    """A random part of each image (B, C, H, W), scaled to the size of the whole, bilinear, and mirrored like
    `random_crop`.

    scale: its area, uniform, in parts of the image; its aspect is log-uniform in (3/4, 4/3), as far as it fits.
    """
    count = len(images)
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=random)
    aspect = ((2 * torch.rand(count, generator=random) - 1) * math.log(4 / 3)).exp()
    extent = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)  # of x and y, in images
    center = (1 - extent) * (2 * torch.rand(count, 2, generator=random) - 1)  # in half images from the middle
    sign = torch.where(_random_flips(count, flip, random), -1.0, 1.0)[:, None]
    height, width = images.shape[2:]
    across, down = (2 * (torch.arange(size) + 0.5) / size - 1 for size in (width, height))  # pixels, from -1 to 1
    x = (center[:, :1] + sign * extent[:, :1] * across)[:, None, :].expand(-1, height, -1)
    y = (center[:, 1:] + extent[:, 1:] * down)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], -1).to(images)  # by hand: affine_grid multiplies matrices, in bfloat16 under autocast
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_roll(images: Tensor, random: torch.Generator, *, pixels: int, flip: bool) -> Tensor:
    """All images (B, C, H, W) shifted alike by up to `pixels` each way, round the edges, and mirrored or not."""
    down, across = torch.randint(-pixels, pixels + 1, (2,), generator=random).tolist()
    images = images.roll((down, across), (2, 3))
    return images.flip(3) if flip and torch.rand(1, generator=random).item() < 0.5 else images


def _random_flips(count: int, enabled: bool, random: torch.Generator) -> Tensor:
    """bool (count,): which images are mirrored; none if that is not wanted."""
    return (torch.rand(count, generator=random) < 0.5) & enabled
