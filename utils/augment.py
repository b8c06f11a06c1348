"""Augmentation and normalization of whole batches, on the device that holds the data set.

A data set is one uint8 tensor (N, H, W, C). A training step passes the indices of its batch and the augmentation
parameters of each image (offsets, angle, flip), and gets the augmented batch from a single gather: no loop over images,
no copy of the data set, no wait for the device. The caller draws the random numbers, so all functions are pure. The
results equal those of torchvision's RandomCrop, RandomRotation (nearest neighbor) and RandomHorizontalFlip with the
same offsets, angles and flips.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pad(images: Tensor, padding: int) -> Tensor:
    """Pad uint8 images (N, H, W, C) with `padding` zeros on each side: (N, H + 2 padding, W + 2 padding, C)."""
    return F.pad(images, (0, 0, padding, padding, padding, padding))


def crop(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Crop `size` x `size` pixels from each chosen image: `crop_flip` without the flip."""
    return _windows(padded, index, top, left[:, None] + torch.arange(size, device=padded.device))


def crop_flip(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop `size` x `size` pixels from each chosen image, and flip it horizontally where `flip` is true.

    Args:
        padded: uint8 (N, H + 2p, W + 2p, C), the padded data set.
        index: int64 (B,), indices of the images of the batch.
        top, left: int64 (B,), upper left corner of each crop, in pixels of the padded image.
        flip: bool (B,).
        size: height and width of the crops, in pixels.

    Returns:
        uint8 (B, size, size, C), contiguous.
    """
    step = torch.arange(size, device=padded.device)
    return _windows(padded, index, top, left[:, None] + torch.where(flip[:, None], size - 1 - step, step))


def rotate_flip(images: Tensor, index: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """Rotate each chosen image about its center, then flip it horizontally where `flip` is true.

    Nearest-neighbor sampling; pixels from outside the image are zero.

    Args:
        images: uint8 (N, H, W, C), the data set.
        index: int64 (B,), indices of the images of the batch.
        angle: float (B,), degrees, counter-clockwise.
        flip: bool (B,).

    Returns:
        uint8 (B, H, W, C), contiguous.
    """
    height, width = images.shape[1:3]
    # float64 for the 2 B numbers of the matrices and float32 for the grid, in torchvision's order of operations, so
    # that pixels halfway between two neighbors round the same way.
    radians = torch.deg2rad(-angle.double())
    cosine, sine = radians.cos().float()[:, None], radians.sin().float()[:, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = torch.where(flip[:, None], -x, x)

    def source(across: Tensor, down: Tensor, length: int) -> Tensor:
        scaled = across[:, None, :] + down[:, :, None]
        return scaled.add_(1).mul_(length / 2).sub_(0.5).round_()

    # Positions outside an image are clamped to a border of zeros.
    chosen = pad(images.index_select(0, index), 1)
    columns = source(x * (cosine / (width / 2)), y * (sine / (width / 2)), width).clamp_(-1, width)
    rows = source(x * (-sine / (height / 2)), y * (cosine / (height / 2)), height).clamp_(-1, height)
    first = torch.arange(len(index), dtype=torch.int32, device=images.device) * ((height + 2) * (width + 2)) + width + 3
    return _gather(chosen, rows.mul_(width + 2).add_(columns).int().add_(first[:, None, None]))


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize uint8 pixels to the network's input, (pixel / 255 - mean) / std.

    Args:
        images: uint8 (B, H, W, C).
        mean, std: float32 (C,), of pixels in [0, 1], on the device of the images.

    Returns:
        float32 (B, C, H, W) in channels-last memory format.
    """
    width = images.shape[2]
    # Whole rows as the innermost dimension: broadcasting over only C = 3 would not vectorize on a CPU.
    scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
    rows = images.reshape(-1, scale.numel()).float()
    torch.addcmul(shift, rows, scale, out=rows)  # in place: fresh memory costs a CPU more than the arithmetic
    return rows.view(images.shape).permute(0, 3, 1, 2)


def denormalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Invert `normalize`: the network's input (B, C, H, W) as pixels in [0, 1], for display."""
    return (images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1)


def _windows(padded: Tensor, index: Tensor, top: Tensor, columns: Tensor) -> Tensor:
    """Square crops of chosen images: rows from `top` (B,) on, columns (B, size)."""
    height, width = padded.shape[1:3]
    rows = (index * height + top)[:, None] + torch.arange(columns.shape[1], device=padded.device)
    return _gather(padded, rows[:, :, None] * width + columns[:, None, :])


def _gather(images: Tensor, position: Tensor) -> Tensor:
    """Pixels (B, h, w, C) of `images` (N, H, W, C) at flat positions (B, h, w)."""
    channels = images.shape[3]
    return images.view(-1, channels).index_select(0, position.view(-1)).view(*position.shape, channels)
