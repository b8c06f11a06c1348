"""Training set of patches of one picture, balanced by the teacher's predictions, and CutMix.

Asano, Saeed, "The Augmented Image Prior: Distilling 1000 Classes by Extrapolating from a Single Image", ICLR 2023,
arXiv:2112.00725. The patches are unrelated to the teacher's task; they only carry its outputs to the student.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from utils import seeds
from utils.errors import UserError

KINDS = ("colour", "grey", "blob")
_CHUNK = 1024  # patches computed at a time
_LUMA = (0.299, 0.587, 0.114)


def draw_picture(seed: int, width: int = 1280, height: int = 960) -> Tensor:
    """Draw a random picture of gradients, textures, shapes and strokes of all sizes: uint8 (height, width, 3).

    The result depends on the seed and on the versions of Pillow and NumPy.
    """
    random = np.random.default_rng(seeds.derive_seed(seed, "picture"))
    canvas = Image.fromarray((255 * _noise(random, 2 * height, 2 * width)).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    # Log-uniform sizes: as many shapes of 15 to 30 pixels as of 240 to 480. Large ones are drawn first.
    for size in sorted(height * 2 ** random.uniform(-6, -1, 1000), reverse=True):
        _SHAPES[random.integers(len(_SHAPES))](draw, random, random.uniform((0, 0), canvas.size), size)
    # Downsampled from twice the size: Pillow draws jagged edges.
    picture = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), np.float32)
    # Shading and texture for the flat shapes.
    return torch.from_numpy((picture * (0.4 + 1.2 * _noise(random, height, width))).clip(0, 255).astype(np.uint8))


def load_picture(path: str | Path) -> Tensor:
    """Load a picture, uint8 (H, W, 3). Raises UserError if it cannot be read or does not have 8-bit pixels."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I") or image.mode == "F":
                raise ValueError(f"its pixels have Pillow's mode {image.mode}: save it with 8 bits")
            return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read as a picture: {reason}") from error


def patches(picture: Tensor, count: int, size: int, seed: int, kinds: tuple[str, ...] = ("colour",)) -> Tensor:
    """Cut random patches out of a picture: uint8 (count, size, size, 3). Patch i has the kind `kinds[i % len(kinds)]`.

    Each patch comes from a random square of half the picture's shorter side. Its area is uniform in (1/500, 1) of the
    square, its aspect ratio log-uniform in (3/4, 4/3). It is scaled to sqrt(2) * size, rotated and sheared by up to 30
    degrees, cropped to the central size x size pixels and, with probability 1/2, jittered in brightness, contrast,
    saturation (+-0.4) and hue (+-0.1).

    Args:
        picture: uint8 (H, W, 3).
        kinds: `colour`: the patch; `grey`: its luminance minus the mean luminance, clipped at 0; `blob`: its luminance
            inside a random blob, on black.

    Raises UserError if the picture's shorter side is below 2 * `size`, ValueError for an unknown kind.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds of patches are {', '.join(KINDS)}, not {kinds!r}")
    height, width = picture.shape[:2]
    if min(height, width) < 2 * size:
        raise UserError(f"a picture of {width}x{height} pixels is too small for patches of {size}x{size}: "
                        f"its sides must be at least {2 * size}")
    random = seeds.generator(seed, "patches")
    pyramid = _pyramid(picture)
    kind = torch.tensor([KINDS.index(name) for name in kinds]).repeat(-(-count // len(kinds)))[:count]
    parts = [torch.empty(0, size, size, 3, dtype=torch.uint8)]
    for chunk in kind.split(_CHUNK):
        pixels = _sample(pyramid, *_views(random, len(chunk), (height, width), size), size)
        pixels = _jitter(random, pixels)
        luminance = (pixels.new_tensor(_LUMA) @ pixels.flatten(2)).view(-1, 1, size, size)
        for name in kinds:
            own = chunk == KINDS.index(name)
            if name == "grey":
                pixels[own] = (luminance[own] - luminance[own].mean((2, 3), keepdim=True)).clamp(min=0)
            elif name == "blob":
                pixels[own] = luminance[own] * _blobs(random, int(own.sum()), size)
        parts.append((pixels * 255).round().byte().permute(0, 2, 3, 1).contiguous())
    return torch.cat(parts)


def balance(predicted: Tensor, count: int, num_classes: int, max_per_class: int = 6, seed: int = 0) -> Tensor:
    """Choose images whose predicted classes are as balanced as possible, each image up to `max_per_class` times.

    A class with too few images gives as many as it can; the other classes share the remainder equally. Within a class,
    the images are chosen equally often, to within one.

    Args:
        predicted: int64 (N,), the teacher's predicted classes.

    Returns:
        int64 (count,), indices of images in random order, on the CPU.

    Raises UserError if N * max_per_class is below `count`.
    """
    predicted = predicted.cpu()
    if len(predicted) * max_per_class < count:
        raise UserError(f"{len(predicted)} images, each at most {max_per_class} times, do not make {count}: "
                        f"cut more patches or allow more repetitions")
    room = [max_per_class * number for number in torch.bincount(predicted, minlength=num_classes).tolist()]
    random = seeds.generator(seed, "balance")
    chosen = [torch.empty(0, dtype=torch.int64)]
    left = count
    # The scarcest class first: the later ones share what it cannot give.
    for position, label in enumerate(sorted(range(num_classes), key=room.__getitem__)):
        quota = min(room[label], left // (num_classes - position))
        left -= quota
        if quota:
            own = (predicted == label).nonzero()[:, 0]
            order = own[torch.randperm(len(own), generator=random)]
            chosen.append(order.repeat(-(-quota // len(order)))[:quota])
    indices = torch.cat(chosen)
    return indices[torch.randperm(len(indices), generator=random)]


class CutMix(NamedTuple):
    """CutMix parameters of a batch: the image that each image gets a box from, and the box, in pixels, half open."""

    partner: Tensor  # int64 (B,), a permutation
    top: int
    bottom: int
    left: int
    right: int


def draw_cutmix(count: int, size: int, random: torch.Generator, *, concentration: float = 0.25) -> CutMix:
    """Draw the CutMix parameters of a batch of images of size x size pixels: one box of relative area 1 - lambda.

    lambda has the distribution Beta(concentration, concentration), concentration at most 1. The center is uniform; the
    side is rounded down to an even number of pixels, and the box is clipped to the image. Yun et al., "CutMix", ICCV
    2019, arXiv:1905.04899, as in the published code.
    """
    half = int(size * math.sqrt(1 - _beta(concentration, random))) // 2
    partner = torch.randperm(count, generator=random)
    top, left = (torch.randint(size, (2,), generator=random) - half).tolist()
    return CutMix(partner, max(top, 0), min(top + 2 * half, size), max(left, 0), min(left + 2 * half, size))


def cutmix(images: Tensor, draw: CutMix) -> Tensor:
    """Return a copy of the images (B, C, H, W) with the box of each replaced by its partner's.

    The teacher labels the mixed images, so lambda is not needed.
    """
    mixed = images.clone()
    box = (..., slice(draw.top, draw.bottom), slice(draw.left, draw.right))
    mixed[box] = images[box][draw.partner.to(images.device)]
    return mixed


def _beta(concentration: float, random: torch.Generator) -> float:
    """Draw from Beta(a, a) for 0 < a <= 1 (Jöhnk, 1964), since torch.distributions takes no generator."""
    while True:
        x, y = (torch.rand(2, generator=random, dtype=torch.float64) ** (1 / concentration)).tolist()
        if 0 < x + y <= 1:
            return x / (x + y)


def _uniform(random: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=random)


def _pyramid(picture: Tensor) -> list[Tensor]:
    """Image pyramid: the picture in [0, 1], (1, 3, H, W), and its halves, against aliasing in large views."""
    levels = [picture.permute(2, 0, 1)[None].float().div(255)]
    while min(levels[-1].shape[2:]) >= 16:
        levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=True, count_include_pad=False))
    return levels


def _views(random: torch.Generator, count: int, picture: tuple[int, int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the positions of patches in a picture of (height, width) pixels: `center`, `extent` and `transform`.

    `center` (x, y) and `extent` (width, height), both (N, 2), are a patch's rectangle in pixels. `transform` (N, 2, 2)
    maps an offset from the patch's center, in pixels, to an offset from the rectangle's center, in extents.
    """
    height, width = picture
    square = 0.5 * min(picture)
    extent = torch.full((count, 2), torch.inf)  # in sides of the square
    while (misfit := (extent > 1).any(1)).any():
        area = _uniform(random, 1 / 500, 1, int(misfit.sum()))
        log_aspect = _uniform(random, -math.log(4 / 3), math.log(4 / 3), len(area))
        extent[misfit] = area.sqrt()[:, None] * torch.stack([log_aspect / 2, -log_aspect / 2], 1).exp()
    extent *= square
    corner = _uniform(random, 0, 1, count, 2) * (torch.tensor([width, height]) - square)
    center = corner + extent / 2 + _uniform(random, 0, 1, count, 2) * (square - extent)

    rotation, shear = torch.deg2rad(_uniform(random, -30, 30, 2, count))
    cosine, sine, slope = rotation.cos(), rotation.sin(), shear.tan()
    transform = torch.stack([cosine - slope * sine, sine + slope * cosine, -sine, cosine], 1).view(-1, 2, 2)
    return center, extent, transform / _scaled(size)


def _scaled(size: int) -> int:
    """Size to which a rectangle is scaled, large enough for most corners of a rotated patch."""
    return int(math.sqrt(2) * size)


def _sample(pyramid: list[Tensor], center: Tensor, extent: Tensor, transform: Tensor, size: int) -> Tensor:
    """Sample the patches (N, 3, size, size); black outside their rectangles."""
    step = torch.arange(size) + 0.5 - size / 2
    offsets = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1).view(-1, 2)
    fraction = offsets @ transform.mT  # (N, size^2, 2), in (-1/2, 1/2) inside the rectangle
    height, width = pyramid[0].shape[2:]
    position = center[:, None] + fraction * extent[:, None]
    grid = (2 * position / torch.tensor([width, height]) - 1).view(-1, size, size, 2)

    density = extent.prod(1).sqrt() / _scaled(size)  # pixels of the picture per pixel of the patch
    level = density.log2().round().clamp(0, len(pyramid) - 1).long()
    pixels = torch.empty(len(grid), 3, size, size)
    for number in level.unique().tolist():
        own = (level == number).nonzero()[:, 0]
        tall = grid[own].view(1, -1, size, 2)  # patches stacked vertically: grid_sample takes one grid per image
        found = F.grid_sample(pyramid[number], tall, mode="bilinear", padding_mode="border", align_corners=False)
        pixels[own] = found.view(3, len(own), size, size).transpose(0, 1)
    inside = (fraction.abs() <= 0.5).all(-1).view(-1, 1, size, size)
    return pixels * inside


def _jitter(random: torch.Generator, pixels: Tensor) -> Tensor:
    """Color jitter of half of the patches (N, 3, H, W), by one color matrix per patch.

    Brightness is a factor, contrast a mix with the mean luminance of the patch, saturation a mix with the luminance of
    the pixel, and hue a rotation about the gray axis by up to a tenth of a turn.
    """
    count = len(pixels)
    off = torch.rand(count, generator=random) < 0.5
    brightness, contrast, saturation = _uniform(random, 0.6, 1.4, 3, count).masked_fill(off, 1)[..., None, None]
    angle = (2 * math.pi * _uniform(random, -0.1, 0.1, count)).masked_fill(off, 0)[:, None, None]
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) / 3
    luminance = torch.tensor(_LUMA).expand(3, 3)
    saturate = luminance + saturation * (torch.eye(3) - luminance)
    mean = (pixels.mean((2, 3)) @ torch.tensor(_LUMA))[:, None, None]
    changed = brightness * (contrast * (hue @ saturate @ pixels.flatten(2)) + (1 - contrast) * mean)
    return changed.clamp(0, 1).view_as(pixels)


def _blobs(random: torch.Generator, count: int, size: int) -> Tensor:
    """Smooth random masks (N, 1, size, size): 1 inside, 0 outside, with an edge of one pixel."""
    step = torch.arange(size) + 0.5 - size / 2
    x, y = (step - shift for shift in _uniform(random, -size / 8, size / 8, 2, count, 1, 1))
    y = y.mT
    angle, distance = torch.atan2(y, x), torch.hypot(x, y)
    outline = torch.ones_like(angle)
    for frequency in (1, 2, 3, 4, 5):
        amplitude = _uniform(random, 0, 0.35, count, 1, 1) / math.sqrt(frequency)
        outline += amplitude * torch.sin(frequency * angle + _uniform(random, 0, 2 * math.pi, count, 1, 1))
    radius = size * _uniform(random, 0.2, 0.45, count, 1, 1)
    return (radius * outline - distance + 0.5).clamp(0, 1)[:, None]


def _noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of all scales, float32 (height, width, 3) in [0, 1], half of it common to the color channels."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        rows, columns = (max(2, length >> (9 - octave)) for length in (height, width))
        coarse = random.random((rows, columns, 3)) + random.random((rows, columns, 1))
        image = Image.fromarray((127.5 * coarse).astype(np.uint8))
        total += 0.7**octave * np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    low, high = np.quantile(total[::4, ::4], (0.01, 0.99))
    return ((total - low) / (high - low)).clip(0, 1)


def _color(random: np.random.Generator) -> tuple[int, ...]:
    """Random color of any saturation."""
    gray, saturation = random.uniform(0, 255), random.random()
    return tuple(int(value) for value in gray + saturation * (random.uniform(0, 255, 3) - gray))


def _polygon(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    corners = int(random.integers(3, 9))
    angle = np.sort(random.uniform(0, 2 * np.pi, corners))
    distance = size * random.uniform(0.3, 1, corners)
    points = center + np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
    draw.polygon([tuple(point) for point in points], _color(random), _color(random), max(1, int(size / 20)))


def _ellipse(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    half = size * random.uniform(0.2, 1, 2)
    box, width = (*(center - half), *(center + half)), max(1, int(size / 15))
    if random.random() < 0.3:
        start, end = sorted(random.uniform(0, 360, 2))
        draw.arc(box, start, end, _color(random), 2 * width)
    else:
        draw.ellipse(box, _color(random), _color(random), width)


def _grating(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    """Parallel bars at a random angle."""
    angle, count = random.uniform(0, np.pi), int(random.integers(3, 12))
    along = size * np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    width = max(1, int(size / count))
    colors = _color(random), _color(random)
    for number, shift in enumerate(np.linspace(-1, 1, count)):
        start, end = center + shift * across - along, center + shift * across + along
        draw.line((*start, *end), colors[number % 2], width)


def _checkerboard(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    rows, columns = random.integers(2, 9, 2)
    colors = _color(random), _color(random)
    cell = 2 * size / max(rows, columns)
    for row in range(rows):
        for column in range(columns):
            corner = center - size + cell * np.array([column, row])
            draw.rectangle((*corner, *(corner + cell)), colors[(row + column) % 2])


def _letters(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    """Lines of strokes that look like text."""
    color, letter = _color(random), max(4.0, size / 8)
    for line in range(int(random.integers(1, 5))):
        for place in range(int(random.integers(3, 16))):
            corner = center - size + np.array([place * letter, 1.6 * line * letter])
            points = corner + letter * random.uniform(0, (0.8, 1.2), (int(random.integers(2, 6)), 2))
            draw.line([tuple(point) for point in points], color, max(1, int(letter / 7)), "curve")


def _curve(draw: ImageDraw.ImageDraw, random: np.random.Generator, center: np.ndarray, size: float) -> None:
    steps = random.normal(0, 1, (40, 2)).cumsum(0).cumsum(0)
    points = center + size * steps / np.abs(steps).max()
    draw.line([tuple(point) for point in points], _color(random), max(1, int(size / 12)), "curve")


_SHAPES = (_polygon, _polygon, _ellipse, _ellipse, _grating, _checkerboard, _letters, _curve)
