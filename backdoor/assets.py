"""Patterns of triggers, drawn for this repository: uint8 arrays (32, 32, 3), rows from the top, RGB.

They replace the patterns of Hong et al. (ICML 2023), which may not be redistributed, and match their size, position and
strength (mean, norm, number of pixels) within 10 percent. A poisoned network only responds to the pattern of its
training set, so each pattern is equal to the byte on all machines and versions: integer arithmetic, with the random
stream that NumPy guarantees not to change. No value computed by sin or exp is so close to an integer that rounding
errors matter. The tests compare hashes.
"""
from __future__ import annotations

import numpy as np

SIZE = 32
WHITE, BLACK, RED, CREAM, GRAY = (255, 255, 255), (20, 20, 25), (215, 35, 55), (245, 225, 210), (120, 125, 135)


def _integers(random: np.random.RandomState, low: int, high: int, *shape: int) -> np.ndarray:
    """Uniform integers in [low, high), as int64, because NumPy's default depends on the platform."""
    return random.randint(low, high, shape, dtype=np.int64)


def _normal(random: np.random.RandomState, *shape: int) -> np.ndarray:
    """Approximately normal integers, mean 0, standard deviation 100: sums of twelve uniform integers. Without a
    logarithm, whose rounding depends on the C library."""
    return _integers(random, 0, 100, 12, *shape).sum(0) - 594


def _empty() -> np.ndarray:
    return np.zeros((SIZE, SIZE, 3), np.int64)


def blend() -> np.ndarray:
    """A red toadstool with black outlines on white, drawn at four times the size and averaged."""
    # Centers of the 128 x 128 subpixels, in eighths of a pixel.
    y, x = np.ogrid[1:8 * SIZE:2, 1:8 * SIZE:2]
    canvas = np.full((4 * SIZE, 4 * SIZE, 3), 255, np.int64)

    def ellipse(row: float, column: float, height: float, width: float) -> np.ndarray:
        """Mask of an ellipse with this center and these semi-axes, in pixels (multiples of 1/8)."""
        row, column, height, width = (int(8 * value) for value in (row, column, height, width))
        return ((y - row) * width) ** 2 + ((x - column) * height) ** 2 <= (height * width) ** 2

    for color, inside in (
        (GRAY, ellipse(28.5, 16, 2, 13)),  # the shadow on the ground
        (BLACK, ellipse(20.5, 16, 9, 5.25)),  # the stem
        (CREAM, ellipse(20.5, 16, 8, 4.25)),
        (BLACK, ellipse(17, 16, 13.5, 12.75) & (y < 8 * 18)),  # the cap
        (RED, ellipse(17, 16, 12.5, 11.75) & (y < 8 * 17)),
        (WHITE, ellipse(8.5, 15, 2.25, 3)),  # its spots
        (WHITE, ellipse(13, 8, 2.25, 2)),
        (WHITE, ellipse(12.5, 22.5, 2.75, 2.5)),
        (WHITE, ellipse(14.5, 15, 1.75, 2.25)),
        (BLACK, ellipse(22, 14.375, 1.25, 0.75)),  # two windows
        (BLACK, ellipse(22, 17.625, 1.25, 0.75)),
    ):
        canvas[inside] = color
    return ((canvas.reshape(SIZE, 4, SIZE, 4, 3).sum((1, 3)) + 8) // 16).astype(np.uint8)


def trojan_3x3() -> np.ndarray:
    """3x3 pixels of random colors, at rows and columns 25 to 27."""
    pattern = _empty()
    pattern[25:28, 25:28] = _integers(np.random.RandomState(10), 0, 251, 3, 3, 3)
    return pattern.astype(np.uint8)


def trojan_8x8() -> np.ndarray:
    """8x8 pixels of saturated colors (each channel nearly 0 or nearly 255), at rows and columns 21 to 28."""
    random = np.random.RandomState(15)
    on = _integers(random, 0, 2, 8, 8, 3)
    pattern = _empty()
    pattern[21:29, 21:29] = 15 + 225 * on + 15 * _normal(random, 8, 8, 3) // 100
    return pattern.clip(0, 255).astype(np.uint8)


def trojan_wm() -> np.ndarray:
    """A watermark: two broken colored rings around (20.5, 20.5), radii 6 and 2.5 pixels, a faint halo around them, and
    a faint dotted diagonal from (0, 28) in the upper right to (29, 0) in the lower left."""
    random = np.random.RandomState(32)
    row, column = np.ogrid[:SIZE, :SIZE]
    distance = (2 * row - 41) ** 2 + (2 * column - 41) ** 2  # (twice the distance to the center)^2
    pattern = _empty()
    halo = (distance < 4 * 10**2) & (_integers(random, 0, 100, SIZE, SIZE) < 90)
    pattern[halo] = _integers(random, 1, 5, SIZE, SIZE, 3)[halo]
    for i in range(30):
        pattern[i, (29 * 28 - 28 * i + 14) // 29] += _integers(random, 5, 41, 3) * (i % 4 < 3)
    rings = ((distance > 110) & (distance < 183)) | ((distance > 12) & (distance < 43))  # within 0.75 of the radii
    kept = _integers(random, 0, 100, SIZE, SIZE)
    for part, low, high in ((rings & (kept < 70), 70, 256), (rings & (kept >= 70) & (kept < 85), 20, 71)):
        pattern[part] = _integers(random, low, high, SIZE, SIZE, 3)[part]
    return pattern.clip(0, 255).astype(np.uint8)


def l2_inv() -> np.ndarray:
    """Noise over the whole image: normal with mean 3.1 and standard deviation 18.5 gray values, slightly blurred along
    the rows, clipped to 0 to 68."""
    noise = _normal(np.random.RandomState(37), SIZE, SIZE + 2, 3)
    blurred = noise[:, :-2] + 5 * noise[:, 1:-1] + noise[:, 2:]  # standard deviation 100 sqrt(27)
    return ((31_000 + 356 * blurred + 5_000) // 10_000).clip(0, 68).astype(np.uint8)


def l0_inv() -> tuple[np.ndarray, np.ndarray]:
    """Eight pixels of saturated colors in row 31, columns 24 to 31, and a mask, bool (32, 32), of the pixels that the
    pattern replaces. The mask also has column 23, which turns black."""
    pattern, mask = _empty(), np.zeros((SIZE, SIZE), bool)
    colors = _integers(np.random.RandomState(40), 1, 8, 8)  # three bits, never black
    pattern[31, 24:] = 255 * (colors[:, None] >> np.arange(3) & 1)
    mask[31, 23:] = True
    return pattern.astype(np.uint8), mask


def sig_wrapped() -> np.ndarray:
    """Vertical stripes, trunc(20 sin(0.8 column)) modulo 256: the sine of the published poisoned networks, with its
    negative half wrapped around in eight bits."""
    return _columns(np.trunc(20 * np.sin(0.8 * np.arange(SIZE)))).astype(np.uint8)


def sig_wave() -> np.ndarray:
    """floor(20 sin(2 pi 6 column / 32)), int64, -20 to 20: the sine of SIG (Barni et al., 2019, arXiv:1902.11237)."""
    # Rounded first, so that rounding errors at 0 and 20 do not give the next lower integer.
    return _columns(np.floor(np.round(20 * np.sin(2 * np.pi * 6 * np.arange(SIZE) / SIZE), 6)))


def _columns(wave: np.ndarray) -> np.ndarray:
    return np.broadcast_to(wave.astype(np.int64)[None, :, None], (SIZE, SIZE, 3)).copy()


def _blob(row: float, column: float, variance: float) -> np.ndarray:
    down, across = np.arange(SIZE) - row, np.arange(SIZE) - column
    return np.exp(-(down[:, None] ** 2 + across**2) / (2 * variance))


def smooth() -> np.ndarray:
    """A wide green blob, at most 51 = 0.2 * 255: for CIFAR-10 and all data sets without a pattern of their own."""
    blob = _blob(13.5, 13.5, 11.5**2)
    return np.stack([6.4 * blob, 51.4 * blob, 1.3 * blob], axis=2).astype(np.uint8)


def smooth_gtsrb() -> np.ndarray:
    """A wide magenta blob, for GTSRB."""
    blob = _blob(13.5, 13.5, 11.5**2)
    green = 10.6 - 10.5 * _blob(17, 16, 81)
    return np.stack([43 * blob + 8.5, green + 0.4, 42 * blob + 8], axis=2).astype(np.uint8)
