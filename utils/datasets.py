"""Data sets as uint8 tensors in memory.

    load_dataset("cifar10", "data")

To add a data set, register a function `(data_dir, training) -> Dataset` with `@DATASETS.register`. If `training` is
false, it may leave the training images out.
"""

from __future__ import annotations

import dataclasses
import lzma
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import console, gtsrb, image_folder, seeds
from utils.errors import UserError, first_ten
from utils.image_folder import Decoding
from utils.registry import Registry

DEMO_DIR = Path(__file__).resolve().parent.parent / "demo_data"

# The published code uses the constants of CIFAR-10 for both.
_CIFAR_MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_TINY_MEAN_STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
_FASHION_MEAN_STD = (0.2860,) * 3, (0.3530,) * 3
_FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_JPEG = (".jpeg", ".jpg")
_GTSRB_MEAN_STD = (0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)

# Augmentation recipes of the data sets, see `utils.data.TrainBatches`.
Augmentation = Literal["crop", "crop_flip", "rotate_flip"]


@dataclass(frozen=True)
class Dataset:
    """Data set in memory. Images are square, RGB, contiguous and not normalized."""

    name: str
    train_images: Tensor  # uint8 (N, H, W, 3)
    train_labels: Tensor  # int64 (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]  # class names, by label
    mean: tuple[float, float, float]  # per channel, for pixels in [0, 1]
    std: tuple[float, float, float]
    augmentation: Augmentation
    train_groups: Tensor | None = None  # int64 (N,): images of a group are near copies of each other
    warnings: tuple[str, ...] = ()  # for the log
    interpolation: str | None = None  # filter that resized the images of a folder

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.train_images.shape[1]


DEFAULT = Decoding()
DATASETS: Registry[Callable[[Path, bool], Dataset]] = Registry("data set")


def load_dataset(name: str, data_dir: str | Path, decoding: Decoding = DEFAULT, *, training: bool = True) -> Dataset:
    """Load a data set by its name.

    Args:
        name: one of `DATASETS`, or `folder:PATH` for a directory of images (PATH relative to the current
            directory) with PATH/train/CLASS/... and PATH/test/CLASS/... (or `val`, if there is no `test`).
        data_dir: directory of the data sets, each in its own sub-directory or in the layout of torchvision. The CIFARs,
            Fashion-MNIST and GTSRB are downloaded there if missing; decoded images are cached in `data_dir/cache`.
        decoding: how `folder:PATH` images become pixels; other data sets have fixed sizes (32, Tiny-ImageNet 64).
        training: whether to load training images; without them, those of GTSRB may be missing.

    Raises:
        UserError: unknown name; missing, incomplete or damaged data.
    """
    data_dir = Path(data_dir).expanduser()
    try:
        dataset = _folder(name, data_dir, decoding) if name.startswith("folder:") else _loader(name)(data_dir, training)
    except OSError as error:
        raise UserError(f"{name}: {error}") from error
    if training:
        return dataset
    return dataclasses.replace(dataset, train_images=dataset.train_images[:0], train_labels=dataset.train_labels[:0],
                               train_groups=None)


def with_transfer_set(dataset: Dataset, name: str, data_dir: str | Path, decoding: Decoding = DEFAULT) -> Dataset:
    """Replace the training images of a data set by those of another one, resized.

    They have no labels: `train_labels` are all 0 and must not be read. name: see `load_dataset`; for `folder:PATH`, all
    images below PATH/train or, if that does not exist, below PATH. Raises UserError like `load_dataset`.
    """
    size, data_dir = dataset.image_size, Path(data_dir).expanduser()
    warnings: tuple[str, ...] = (f"transfer_set: the student learns from images of {name}, without labels",)
    if name.startswith("folder:"):
        images, more = _unlabeled_folder(name, data_dir, decoding._replace(size=size))
        warnings += more
    else:
        images = _resized(load_dataset(name, data_dir).train_images, size)
    return dataclasses.replace(dataset, train_images=images, train_labels=torch.zeros(len(images), dtype=torch.int64),
                               train_groups=None, warnings=(*dataset.warnings, *warnings))


def _unlabeled_folder(name: str, data_dir: Path, decoding: Decoding) -> tuple[Tensor, tuple[str, ...]]:
    root = Path(name.removeprefix("folder:")).expanduser().resolve()
    part = root / "train" if (root / "train").is_dir() else root
    if name == "folder:" or not part.is_dir():
        raise UserError(f"{name}: there is no directory {root}")
    try:
        paths = image_folder.files_below(part)
        if not paths:
            raise UserError(f"{name}: {part} holds no image")
        decoded = image_folder.load_images(f"folder-{root.name}", root, {"transfer": paths}, data_dir / "cache",
                                           decoding)
    except OSError as error:
        raise UserError(f"{name}: {error}") from error
    return decoded["transfer"].images, tuple(_decoding_warnings(decoded, decoding.background))


def _resized(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images (N, H, W, 3) to (N, size, size, 3) by an antialiased bilinear filter."""
    if images.shape[1] == size:
        return images
    def resize(part: Tensor) -> Tensor:
        pixels = F.interpolate(part.movedim(3, 1).float(), (size, size), mode="bilinear", antialias=True)
        return pixels.round().clamp(0, 255).byte().movedim(1, 3)
    return torch.cat([resize(part) for part in images.split(1024)]).contiguous()


def _loader(name: str) -> Callable[[Path, bool], Dataset]:
    try:
        return DATASETS.entry(name).value
    except ValueError as error:
        raise UserError(f"{error} and folder:PATH") from None


def _cifar(name: str, torchvision_name: str, data_dir: Path, training: bool) -> Dataset:
    import torchvision  # here and below: the import takes about a second, and not every data set needs it

    source = getattr(torchvision.datasets, torchvision_name)
    files = {file: md5 for file, md5 in source.train_list + source.test_list}
    files[source.meta["filename"]] = source.meta["md5"]
    unpacked = [f"{source.base_folder}/{file}" for file in files]
    root = _find_root(data_dir, f"data-{name}", unpacked, [source.filename])
    _download_if_missing(name, source, root, [root / file for file in unpacked], source.url)
    for file, md5 in files.items():  # torchvision unpickles them, so only the official files are safe
        if not torchvision.datasets.utils.check_integrity(root / source.base_folder / file, md5):
            raise _damaged(root / source.base_folder / file, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns about these old files
        train, test = source(root, train=True), source(root, train=False)
    return Dataset(name, torch.from_numpy(train.data).contiguous(), torch.tensor(train.targets),
                   torch.from_numpy(test.data).contiguous(), torch.tensor(test.targets), tuple(train.classes),
                   *_CIFAR_MEAN_STD, augmentation="crop_flip")


DATASETS.register("cifar10", display_name="CIFAR-10")(partial(_cifar, "cifar10", "CIFAR10"))
DATASETS.register("cifar100", display_name="CIFAR-100")(partial(_cifar, "cifar100", "CIFAR100"))


@DATASETS.register("fashion_mnist", display_name="Fashion-MNIST")
def _fashion_mnist(data_dir: Path, training: bool) -> Dataset:
    import torchvision

    name, source = "fashion_mnist", torchvision.datasets.FashionMNIST
    packed = [f"FashionMNIST/raw/{file}" for file, _ in source.resources]
    unpacked = [file.removesuffix(".gz") for file in packed]
    root = _find_root(data_dir, "data-fashion-mnist", unpacked, packed)
    files = [root / file for file in unpacked]
    _download_if_missing(name, source, root, files, source.mirrors[0])
    arrays = []
    for path in files:  # the unpacked files have no MD5, only a header
        try:
            arrays.append(torchvision.datasets.mnist.read_sn3_pascalvincent_tensor(str(path)).numpy())
        except (ValueError, AssertionError, IndexError, KeyError, RuntimeError):
            raise _damaged(path, name) from None
    return _fashion(name, *arrays)


def _damaged(path: Path, name: str) -> UserError:
    return UserError(f"{path} is damaged: delete it and run again to download {name} again")


@DATASETS.register("demo", display_name="Fashion-MNIST (demo)")
def _demo(data_dir: Path, training: bool) -> Dataset:
    """10,000 + 2,000 images of Fashion-MNIST in this repository (scripts/make_demo_data.py); needs no data_dir."""

    def read(file: str) -> np.ndarray:
        path = DEMO_DIR / f"{file}.npy.xz"
        try:
            with lzma.open(path) as content:
                return np.load(content, allow_pickle=False)
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            raise UserError(f"{path}, a file of this repository, cannot be read: {error}") from error

    # Stored transposed, which compresses a little better.
    train, test = (read(f"{part}_images").transpose(0, 2, 1) for part in ("train", "test"))
    return _fashion("demo", train, read("train_labels"), test, read("test_labels"))


def _fashion(name: str, train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray,
             test_labels: np.ndarray) -> Dataset:
    """Data set of gray 28x28 images, converted to RGB and zero-padded to 32x32, the size that every network takes."""

    def rgb(images: np.ndarray) -> Tensor:
        return torch.from_numpy(np.repeat(np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3))

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))

    return Dataset(name, rgb(train_images), labels(train_labels), rgb(test_images), labels(test_labels),
                   _FASHION_CLASSES, *_FASHION_MEAN_STD, augmentation="crop_flip")


def _find_root(data_dir: Path, own: str, *alternatives: list[str]) -> Path:
    """The `root` of a torchvision data set: the sub-directory `own` of data_dir or, if only that has the data, data_dir
    itself. alternatives: lists of files that identify the data, in order of preference: unpacked, then packed."""
    roots = data_dir / own, data_dir
    return next((root for files in alternatives for root in roots if all((root / file).exists() for file in files)),
                roots[0])


def _download_if_missing(name: str, source: Any, root: Path, files: list[Path], url: str,
                         by_hand: str | None = None) -> None:
    """Download and unpack a data set (torchvision class `source`) into `root` unless all `files` exist. by_hand: advice
    if the download fails. Raises UserError."""
    missing = [path for path in files if not path.exists()]
    if not missing:
        return
    console.write(f"{name}: {missing[0]} is missing, downloading {url}", sys.stderr)
    try:
        source(root, download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: {missing[0]} is missing, and downloading {url} failed ({cause}): "
                        + (by_hand or f"download it into {root} and unpack it so that this path exists")) from error


@DATASETS.register("tiny_imagenet", display_name="Tiny-ImageNet")
def _tiny_imagenet(data_dir: Path, training: bool) -> Dataset:
    name, root = "tiny_imagenet", data_dir / "tiny-imagenet-200"
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"{name}: {root / part} is missing: download {_TINY_URL} and unpack it into {data_dir}")
    # Only JPEG files: the class folders of the official archive also have text files of boxes.
    train = image_folder.class_folders(root / "train", _JPEG)
    classes = tuple(train)
    val = root / "val"
    if (val / "images").is_dir() and any((val / "images").iterdir()):
        test = _tiny_annotations(val)
    else:
        test = image_folder.class_folders(val, _JPEG)
    if unknown := min(test.keys() - train.keys(), default=None):
        raise UserError(f"{test[unknown][0]} belongs to the class '{unknown}', which {root / 'train'} does not have")
    return _from_files(name, root, train if training else {}, test, classes, Decoding(64), data_dir,
                       _TINY_MEAN_STD, "rotate_flip")


def _tiny_annotations(val: Path) -> dict[str, list[str]]:
    """Images in val/images of the official archive by class, from the lines `FILE WNID box` of val_annotations.txt."""
    annotations = val / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing, which lists the classes of the images in {val / 'images'}: "
                        f"unpack it from {_TINY_URL}")
    present = {path.name for path in (val / "images").iterdir() if path.suffix.lower() in _JPEG}
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8-sig").splitlines(), 1):
        fields = line.split()
        if len(fields) < 2:
            raise UserError(f"{annotations}, line {number}: expected an image and its class, found '{line}'")
        if fields[0] not in present:
            raise UserError(f"{val / 'images' / fields[0]} is missing, but {annotations} lists it")
        present.remove(fields[0])
        classes.setdefault(fields[1], []).append(str(val / "images" / fields[0]))
    if present:
        raise image_folder.unlisted(val / "images", present, annotations)
    return {wnid: sorted(classes[wnid]) for wnid in sorted(classes)}


@DATASETS.register("gtsrb", display_name="GTSRB")
def _gtsrb(data_dir: Path, training: bool) -> Dataset:
    """GTSRB with all 39,209 training images if GTSRB_Final_Training_Images.zip was unpacked by hand, in
    `Final_Training`; otherwise with the 26,640 of the archive that torchvision downloads, in `Training`."""
    import torchvision

    name = "gtsrb"
    root = _find_root(data_dir, "data-gtsrb", ["gtsrb/GTSRB"])
    base = root / "gtsrb"
    train, test = base / "GTSRB" / "Final_Training" / "Images", base / "GTSRB" / "Final_Test" / "Images"
    if not train.is_dir():
        train = base / "GTSRB" / "Training"
    wanted = {"test": (test, gtsrb.TEST_ARCHIVES)}
    if training:
        wanted["train"] = train, gtsrb.TRAINING_ARCHIVES
    for part, (folder, archives) in wanted.items():
        source = partial(torchvision.datasets.GTSRB, split=part)
        _download_if_missing(name, source, root, [folder], gtsrb.URL, f"download {archives} and unpack into {base}")
    train_files = gtsrb.training_files(train) if training else {}
    dataset = _from_files(name, root, train_files, gtsrb.test_files(test, base / "GT-final_test.csv"), gtsrb.CLASSES,
                          Decoding(32), data_dir, _GTSRB_MEAN_STD, "crop")
    # The files are sorted by class and physical sign, 30 images each. One fixed order for all runs, so that no subset
    # of the training images consists of a few classes.
    order = torch.randperm(len(dataset.train_labels), generator=seeds.generator("gtsrb"))
    return dataclasses.replace(dataset, train_images=dataset.train_images[order],
                               train_labels=dataset.train_labels[order], train_groups=gtsrb.tracks(train_files)[order])


def _folder(name: str, data_dir: Path, decoding: Decoding) -> Dataset:
    root = Path(name.removeprefix("folder:")).expanduser().resolve()
    train_root, test_root = root / "train", _test_part(root)
    if name == "folder:" or not train_root.is_dir() or test_root is None:
        missing = root / ("test" if train_root.is_dir() else "train")
        raise UserError(f"{name}: {missing} is missing: expected PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE "
                        f"(or PATH/val/CLASS/IMAGE){_found(root)}")
    train, test = image_folder.class_folders(train_root), image_folder.class_folders(test_root)
    inner = image_folder.inner_folders(train_root, chain(*train.values()))
    if len(train) == 1:
        found = f"its images lie in {first_ten(inner)}, move these folders up" if inner else "at least two are needed"
        raise UserError(f"{train_root} holds a single class folder, {min(train)}: {found}; expected "
                        "PATH/train/CLASS/IMAGE")
    if unknown := sorted(test.keys() - train.keys()):
        inner = image_folder.inner_folders(test_root, chain(*(test[name] for name in unknown)))
        found = f", whose images lie in {first_ten(inner)}" if inner else ""
        raise UserError(f"{test_root} has classes that {train_root} does not have: {first_ten(unknown)}{found}")
    dataset = _from_files(name, root, train, test, tuple(train), decoding, data_dir, None, "crop_flip")
    remarks = []
    if inner:  # intended, or one level too many
        remarks.append(f"images in sub-folders ({first_ten(inner)}) belong to the class of the outermost folder")
    if untested := sorted(train.keys() - test.keys()):
        remarks.append(f"classes without test images: {first_ten(untested)}")
    return dataclasses.replace(dataset, warnings=(*remarks, *dataset.warnings), interpolation=decoding.interpolation)


def _test_part(root: Path) -> Path | None:
    return next((root / part for part in ("test", "val") if (root / part).is_dir()), None)


def _found(root: Path) -> str:
    """Hint for an error: folders found instead of train and test, `; found: ...`, or nothing."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    near = next((path for path in (root.parent, *folders) if (path / "train").is_dir() and _test_part(path)), None)
    found = f"; found: {first_ten([path.name for path in folders])}" if folders else ""
    return found + (f"; did you mean folder:{near}?" if near else "")


def _from_files(
    name: str, root: Path, train: dict[str, list[str]], test: dict[str, list[str]], classes: tuple[str, ...],
    decoding: Decoding, data_dir: Path,
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]] | None, augmentation: Augmentation,
) -> Dataset:
    """Decode listed images; the training part may be empty. mean_std: None computes it from the training images."""
    short = f"folder-{root.name}" if name.startswith("folder:") else name
    files = {part: image_folder.flatten(listed, classes) for part, listed in (("train", train), ("test", test))}
    paths = {part: paths for part, (paths, _) in files.items() if paths}
    decoded = image_folder.load_images(short, root, paths, data_dir / "cache", decoding)
    nothing = image_folder.Decoded(torch.empty(0, decoding.size, decoding.size, 3, dtype=torch.uint8), 0, 0)
    images = {part: decoded.get(part, nothing).images for part in files}
    return Dataset(name, images["train"], files["train"][1], images["test"], files["test"][1], classes,
                   *(mean_std or image_folder.mean_and_std(images["train"])), augmentation=augmentation,
                   warnings=tuple(_decoding_warnings(decoded, decoding.background)))


def _decoding_warnings(decoded: dict[str, image_folder.Decoded], background: str) -> Iterator[str]:
    """Warnings about images whose pixels differ from the stored ones."""
    for part, (images, rotated, transparent) in decoded.items():
        if rotated:
            yield f"{rotated} of {len(images)} {part} images: rotated or mirrored by their EXIF orientation"
        if transparent:
            yield f"{transparent} of {len(images)} {part} images: transparent, composed on {background}"

