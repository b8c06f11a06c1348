"""Directories of image files as uint8 tensors: listed, decoded once by all cores, then read from a cache."""

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError

_CHUNK = 64  # images per task of the thread pool


def class_folders(root: Path, suffixes: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The image files below each class folder of `root`: {class: paths}, both sorted.

    Files may lie in sub-folders of a class folder; hidden files and folders are left out. `suffixes` (lower case)
    restricts which files count; without it every file does. UserError for a missing or empty `root` or class folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a directory")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} holds no class folders")
    classes = {name: _files(root / name, suffixes) for name in names}
    for name, paths in classes.items():
        if not paths:
            raise UserError(f"{root / name} holds no image: fill it or delete it")
    return classes


def flatten(classes: dict[str, list[str]], order: Sequence[str]) -> tuple[list[str], Tensor]:
    """All paths, class by class, and their labels int64 (N,): positions of the classes in `order`."""
    position = {name: number for number, name in enumerate(order)}
    labels = [position[name] for name, paths in classes.items() for _ in paths]
    return [path for paths in classes.values() for path in paths], torch.tensor(labels, dtype=torch.int64)


def load_images(name: str, root: Path, paths: Sequence[str], size: int, cache_dir: Path) -> Tensor:
    """The images at `paths`, each scaled to `size` x `size` pixels: uint8 (N, size, size, 3), in the order of `paths`.

    The decoded images are kept in `cache_dir` as NAME-FINGERPRINT.npy. A cache that cannot be read is made again; one
    that cannot be written costs a warning and nothing else. UserError names an image that cannot be read.
    """
    shape = (len(paths), size, size, 3)
    cache = cache_dir / f"{name}-{_fingerprint(root, paths, size)}.npy"
    images = _read_cache(cache, shape)
    if images is None:
        images = _decode(name, paths, shape)
        _write_cache(cache, images)
    return torch.from_numpy(images)


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel over all pixels of uint8 images (N, H, W, C), for pixels in [0, 1], in float64."""
    counts = torch.zeros(images.shape[3], 256, dtype=torch.int64)
    for chunk in images.split(256):
        for channel, count in enumerate(counts):
            count += torch.bincount(chunk[..., channel].flatten(), minlength=256)
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(dim=1).sqrt()
    # A channel that never varies carries nothing; dividing by its 0 would make everything NaN.
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1).tolist())


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave the directory out

    paths = []
    for directory, subdirectories, files in os.walk(folder, onerror=fail, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        paths += [os.path.join(directory, name) for name in files
                  if not name.startswith(".") and (not suffixes or name.lower().endswith(suffixes))]
    return sorted(paths)


def _fingerprint(root: Path, paths: Sequence[str], size: int) -> str:
    """Changes with the place of the data, the names, order, sizes and times of the files and the image size."""
    digest = hashlib.sha256(os.fsencode(root.resolve()) + f"\n{size}\n".encode())
    for path in paths:
        status = os.stat(path)
        digest.update(os.fsencode(path.removeprefix(str(root))))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decode(name: str, paths: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    images = np.empty(shape, np.uint8)

    def decode(start: int) -> int:
        chunk = paths[start:start + _CHUNK]
        for position, path in enumerate(chunk, start):
            images[position] = _read_rgb(path, shape[1])
        return len(chunk)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=len(paths), desc=f"decoding {name}", unit=" images", disable=None) as progress:
            for count in pool.map(decode, range(0, len(paths), _CHUNK)):
                progress.update(count)
    finally:
        pool.shutdown(cancel_futures=True)
    return images


def _read_rgb(path: str, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                # Pillow's own conversion of 16-bit pixels clips them at 255, which leaves a white image.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode} have no fixed range, save it with 8 bits")
            elif image.mode == "P":
                image = image.convert("RGBA")  # Pillow warns where transparent palettes become RGB in one step
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error


def _read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        images = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_cache(cache: Path, images: np.ndarray) -> None:
    unfinished = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                np.save(file, images)
            unfinished.replace(cache)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        _warn_once(f"{cache.parent} cannot be written ({reason}): images will be decoded again in every run")


@functools.cache
def _warn_once(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
