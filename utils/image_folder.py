"""Directories of image files as uint8 tensors, decoded once on all cores and then read from a cache."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils import console
from utils.errors import UserError, first_line, first_ten, one_line
from utils.params import Params

_CHUNK = 64  # images per task of the thread pool
# Part of the cache key: increase it when a change to the decoding changes pixels.
_DECODING = 2
# Files and folders that Windows, macOS and storage servers create (lower case); names with a dot are hidden.
_SYSTEM_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx",
                           "@eadir", "$recycle.bin", "system volume information"})
_UPRIGHT = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoding(NamedTuple):
    """How image files become pixels."""

    size: int = 32  # height and width after resizing
    background: str = "white"  # behind transparent pixels, a color name of Pillow
    interpolation: str = "bilinear"  # filter of the resizing: `nearest`, `bilinear`, `bicubic` or `lanczos`

    @classmethod
    def of(cls, params: Params) -> Decoding:
        return cls(params.image_size, params.background, params.interpolation)


class Decoded(NamedTuple):
    """Decoded image files, and the numbers of those whose stored pixels were changed."""

    images: Tensor  # uint8 (N, size, size, 3)
    rotated: int  # images that their EXIF orientation rotated or mirrored
    transparent: int  # images that were composed on the background


class _Part(NamedTuple):
    images: np.ndarray  # as `Decoded.images`
    counts: np.ndarray  # int64 (2,): rotated, transparent


def text_of(name: str) -> str:
    """Name of a file or folder in a form that does not depend on the system: NFC, and `\\xHH` for bytes that are not
    UTF-8."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def class_folders(root: Path, suffixes: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Image files below each class folder of `root`: {class: paths}, both sorted.

    The name of a class is `text_of` the folder's name; paths are those on disk. Files may lie in sub-folders of a class
    folder; hidden and system files and folders are skipped. suffixes (lower case): file types; empty: all files. Raises
    UserError for a missing or empty `root` or class folder, and for two folders of one class.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a directory")
    folders: dict[str, Path] = {}
    for entry in sorted(root.iterdir()):
        if _is_skipped(entry.name) or not entry.is_dir():
            continue
        name = text_of(entry.name)
        if (other := folders.setdefault(name, entry)) != entry:
            raise UserError(f"{root} holds two folders of the class {name}, {other.name!a} and "
                            f"{entry.name!a}: move the images of one into the other")
    if not folders:
        raise UserError(f"{root} holds no class folders")
    classes = {name: files_below(folders[name], suffixes) for name in sorted(folders)}
    if empty := [str(folders[name]) for name, paths in classes.items() if not paths]:
        raise UserError(f"{empty[0]} holds no image: fill it or delete it" if len(empty) == 1 else
                        f"{len(empty)} class folders hold no image: {first_ten(empty)}: fill or delete them")
    return classes


def inner_folders(part: Path, paths: Iterable[str]) -> list[str]:
    """Sub-folders of class folders that have images: `CLASS/FOLDER`, sorted, without repetition."""
    places = (Path(folder).relative_to(part).parts for folder in {os.path.dirname(path) for path in paths})
    return sorted({text_of(os.path.join(*place[:2])) for place in places if len(place) > 1})


def unlisted(folder: Path, names: Collection[str], listing: Path) -> UserError:
    """Error for image files in `folder` that are missing in `listing`, the list of their classes."""
    paths = first_ten([str(folder / name) for name in sorted(names)])
    return UserError(f"{paths} has no class: {listing} does not list it" if len(names) == 1 else
                     f"{len(names)} images have no class, {listing} does not list them: {paths}")


def flatten(classes: dict[str, list[str]], order: Sequence[str]) -> tuple[list[str], Tensor]:
    """Paths of all classes, and their labels int64 (N,), the positions of the classes in `order`."""
    position = {name: number for number, name in enumerate(order)}
    labels = [position[name] for name, paths in classes.items() for _ in paths]
    return [path for paths in classes.values() for path in paths], torch.tensor(labels, dtype=torch.int64)


def load_images(
    name: str, root: Path, parts: Mapping[str, Sequence[str]], cache_dir: Path, decoding: Decoding,
) -> dict[str, Decoded]:
    """Decode the images of each part, {part: paths}, in the order of the paths. The EXIF orientation is applied.

    Decoded images are cached in `cache_dir` as NAME-PART-FINGERPRINT.npy. An unreadable cache is replaced; if it cannot
    be written, there is a warning. Raises UserError with the unreadable images of all parts (the first ten and their
    number).
    """
    decoded, unreadable = {}, []
    for part, paths in parts.items():
        shape = (len(paths), decoding.size, decoding.size, 3)
        cache = cache_dir / f"{name}-{part}-{_fingerprint(root, paths, decoding)}.npy"
        content = _read_cache(cache, shape)
        if content is None:
            content, problems = _decode(f"{name}-{part}", paths, shape, decoding)
            unreadable += problems
            if not problems:
                _write_cache(cache, content)
        decoded[part] = Decoded(torch.from_numpy(content.images), *content.counts.tolist())
    if len(unreadable) == 1:
        path, reason = unreadable[0]
        raise UserError(f"{path} cannot be read as an image ({reason}): replace or remove it")
    if unreadable:
        raise UserError(f"{len(unreadable)} files cannot be read as images: "
                        f"{first_ten([f'{path} ({reason})' for path, reason in unreadable])}: replace or remove them")
    return decoded


def mean_and_std(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of uint8 images (N, H, W, 3), for pixels in [0, 1], in float64."""
    counts = torch.zeros(images.shape[3], 256, dtype=torch.int64)
    for chunk in images.split(256):
        for channel, count in enumerate(counts):
            count += torch.bincount(chunk[..., channel].flatten(), minlength=256)
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(dim=1).sqrt()
    # The standard deviation of a constant channel is 1, since dividing by 0 would give NaN.
    (red, green, blue), (of_red, of_green, of_blue) = mean.tolist(), torch.where(std > 0, std, 1).tolist()
    return (red, green, blue), (of_red, of_green, of_blue)


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def files_below(folder: Path, suffixes: tuple[str, ...] = ()) -> list[str]:
    """Files below a folder, sorted, without hidden and system files. suffixes (lower case): file types; empty: all."""
    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the directory

    paths = []
    for directory, subdirectories, files in os.walk(folder, onerror=fail, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not _is_skipped(name)]
        paths += [os.path.join(directory, name) for name in files
                  if not _is_skipped(name) and (not suffixes or name.lower().endswith(suffixes))]
    return sorted(paths)


def _fingerprint(root: Path, paths: Sequence[str], decoding: Decoding) -> str:
    """Hash of the directory, the names, order, sizes and times of the files, and the decoding options."""
    digest = hashlib.sha256(os.fsencode(root.resolve()) + f"\n{_DECODING}\n{decoding}\n".encode())
    for path in paths:
        digest.update(os.fsencode(path.removeprefix(str(root))))
        with contextlib.suppress(OSError):  # a dangling link is reported with the unreadable files
            status = os.stat(path)
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decode(name: str, paths: Sequence[str], shape: tuple[int, ...], decoding: Decoding,
            ) -> tuple[_Part, list[tuple[str, str]]]:
    """Decoded images, and path and reason of each unreadable file."""
    images, marks = np.empty(shape, np.uint8), np.zeros((len(paths), 2), bool)

    def decode(start: int) -> tuple[int, list[tuple[str, str]]]:
        chunk = paths[start:start + _CHUNK]
        problems: list[tuple[str, str]] = []
        for position, path in enumerate(chunk, start):
            try:
                images[position], *marks[position] = _read_rgb(path, decoding)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
                problems.append((path, _reason(error)))
        return len(chunk), problems

    unreadable: list[tuple[str, str]] = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with tqdm(total=len(paths), desc=f"decoding {name}", unit=" images", disable=None) as progress:
            for count, problems in pool.map(decode, range(0, len(paths), _CHUNK)):
                unreadable += problems
                progress.update(count)
    finally:
        pool.shutdown(cancel_futures=True)
    return _Part(images, marks.sum(axis=0, dtype=np.int64)), unreadable


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return getattr(error, "strerror", None) or first_line(error)  # without the path, which the message has


def _read_rgb(path: str, decoding: Decoding) -> tuple[np.ndarray, bool, bool]:
    """Pixels uint8 (size, size, 3) of an image file, whether EXIF rotated them, and whether some were transparent."""
    size = decoding.size, decoding.size
    with Image.open(path) as image:
        image.load()  # EXIF may follow the pixels; Pillow rotates TIFF images here
        transpose = _UPRIGHT.get(_orientation(image))
        pixels, transparent = _to_rgb(image, decoding.background)
        if transpose is not None:
            pixels = pixels.transpose(transpose)
        if pixels.size != size:
            pixels = pixels.resize(size, Image.Resampling[decoding.interpolation.upper()])
        return np.asarray(pixels), transpose is not None, transparent


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF; the pixels are intact
        return None


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """Convert an image to 8-bit RGB on the background. Returns it and whether it had transparent pixels."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow clips 16-bit pixels at 255, which gives a white image.
        pixels, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(pixels != transparent).convert("L"))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {image.mode} have no fixed range: save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB"), True
    return image.convert("RGB"), False


def _read_cache(cache: Path, shape: tuple[int, ...]) -> _Part | None:
    try:
        with open(cache, "rb") as file:
            content = _Part(np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    images, counts = content
    right = images.shape == shape and images.dtype == np.uint8 and counts.shape == (2,) and counts.dtype == np.int64
    return content if right else None


def _write_cache(cache: Path, content: _Part) -> None:
    unfinished = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                for array in content:
                    np.save(file, array)
            unfinished.replace(cache)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        _warn_once(f"{cache.parent} cannot be written ({reason}): every run will decode the images again")


@functools.cache
def _warn_once(message: str) -> None:
    console.write(f"warning: {one_line(message)}", sys.stderr)
