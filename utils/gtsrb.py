"""Files of GTSRB, the German Traffic Sign Recognition Benchmark: Stallkamp, Schlipsing, Salmen, Igel, "Man vs.
computer", Neural Networks 2012.

Images have sides of 15 to 250 pixels. Training images are in one folder per class, 00000 to 00042, test images in a
single folder. CSV lists (separator `;`, columns `Filename`, `ClassId` and others) name the images and their classes.
"""
from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from utils import image_folder
from utils.errors import UserError, first_ten

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"  # torchvision does not export its own
# Archives below URL.
TEST_ARCHIVES = "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip"
TRAINING_ARCHIVES = "GTSRB_Final_Training_Images.zip (all 39,209 images) or GTSRB-Training_fixed.zip (26,640)"
CLASSES = (
    "Speed limit 20", "Speed limit 30", "Speed limit 50", "Speed limit 60", "Speed limit 70", "Speed limit 80",
    "End of speed limit 80", "Speed limit 100", "Speed limit 120", "No passing", "No passing for lorries",
    "Right of way at the next crossing", "Priority road", "Give way", "Stop", "No vehicles", "No lorries", "No entry",
    "Danger", "Bend to the left", "Bend to the right", "Double bend", "Uneven road", "Slippery road",
    "Road narrows on the right", "Road works", "Traffic lights", "Pedestrians", "Children", "Bicycles", "Ice or snow",
    "Wild animals", "End of all limits", "Turn right", "Turn left", "Straight ahead", "Straight ahead or right",
    "Straight ahead or left", "Keep right", "Keep left", "Roundabout", "End of no passing",
    "End of no passing for lorries",
)
_OF_ID = {str(number): name for number, name in enumerate(CLASSES)}
_SUFFIX = ".ppm"


def training_files(root: Path) -> dict[str, list[str]]:
    """Images in the class folders of `root`: {class: paths}, sorted by class number and file name.

    Raises UserError for a missing, empty or unknown class folder, and for a missing image that the list in its folder
    names. The lists are optional.
    """
    found = image_folder.class_folders(root, (_SUFFIX,))
    classes = {f"{number:05d}": name for number, name in enumerate(CLASSES)}
    if missing := classes.keys() - found.keys():
        raise UserError(f"{root / min(missing)} is missing (a class of GTSRB): unpack the archive again")
    if unknown := sorted(found.keys() - classes.keys()):
        folders = first_ten([str(root / name) for name in unknown])
        raise UserError(f"{folders} is no class of GTSRB: remove it" if len(unknown) == 1 else
                        f"{len(unknown)} folders are no classes of GTSRB: {folders}: remove them")
    for folder, paths in found.items():
        listing, present = root / folder / f"GT-{folder}.csv", set(paths)
        for file, _ in _read(listing) if listing.is_file() else ():
            if str(root / folder / file) not in present:
                raise _missing_image(listing, root / folder / file)
    return {name: found[folder] for folder, name in classes.items()}


def tracks(files: dict[str, list[str]]) -> Tensor:
    """Number of the physical sign of each training file, int64 (N,). The about 30 images of a sign,
    CLASS/TRACK_FRAME.ppm, are video frames and near copies of each other."""
    numbers: dict[tuple[str, str], int] = {}
    folders_and_names = (os.path.split(path) for paths in files.values() for path in paths)
    signs = ((folder, name.rpartition("_")[0] or name) for folder, name in folders_and_names)
    return torch.tensor([numbers.setdefault(sign, len(numbers)) for sign in signs], dtype=torch.int64)


def test_files(folder: Path, listing: Path) -> dict[str, list[str]]:
    """Images in `folder` by their class in the file `listing`: {class: paths}, sorted by class number and file name.

    Raises UserError for a missing or damaged list, and for an image that is missing, not listed, or listed twice.
    """
    if not listing.is_file():
        raise UserError(f"{listing} is missing, which lists the classes of the images in {folder}: unpack it from "
                        f"{URL}/GTSRB_Final_Test_GT.zip")
    unlisted = {path.name for path in folder.iterdir() if path.suffix == _SUFFIX}
    seen: set[str] = set()
    classes: dict[str, list[str]] = {name: [] for name in CLASSES}
    for file, name in _read(listing):
        if file in seen:
            raise UserError(f"{listing} lists {file} twice: replace it by that of {URL}/GTSRB_Final_Test_GT.zip")
        if file not in unlisted:
            raise _missing_image(listing, folder / file)
        seen.add(file)
        unlisted.remove(file)
        classes[name].append(str(folder / file))
    if unlisted:
        raise image_folder.unlisted(folder, unlisted, listing)
    return classes


def _read(listing: Path) -> Iterator[tuple[str, str]]:
    """File and class name of each image in a list."""
    with open(listing, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file, delimiter=";", skipinitialspace=True, quoting=csv.QUOTE_NONE)
        try:
            for row in rows:
                if not row.get("Filename") or row.get("ClassId") not in _OF_ID:
                    raise UserError(f"{listing}, line {rows.reader.line_num}: expected an image and its class, 0 to "
                                    f"{len(CLASSES) - 1}, in columns Filename and ClassId with `;` between columns")
                yield row["Filename"], _OF_ID[row["ClassId"]]
        except csv.Error as error:
            raise UserError(f"{listing}, line {rows.reader.line_num}: {error}") from None


def _missing_image(listing: Path, image: Path) -> UserError:
    return UserError(f"{image} is missing, but {listing} lists it: unpack the archive again")
