"""What the archives of GTSRB hold, the German Traffic Sign Recognition Benchmark: Stallkamp, Schlipsing, Salmen, Igel,
"Man vs. computer", Neural Networks 2012.

Images of 15 to 250 pixels a side. Training images lie in a folder for each class, 00000 to 00042, test images in one
folder. Lists say what there is, and which class the test images have: `;` between columns, `Filename` and `ClassId`
among them.
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

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"  # torchvision does not tell its own
# What is to be had there.
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
    """The images in the class folders of `root`: {class: paths}, by number and name.

    UserError: a class folder that is missing, empty or of no class; an image that the list in its folder names and that
    is not there. Either archive of training images has such lists, but they are no condition.
    """
    found = image_folder.class_folders(root, (_SUFFIX,))
    classes = {f"{number:05d}": name for number, name in enumerate(CLASSES)}
    if missing := classes.keys() - found.keys():
        raise UserError(f"{root / min(missing)} is missing, a class of GTSRB: unpack its archive again")
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
    """The sign that each of the training files shows, in their order: int64 (N,). A sign was filmed as it was passed,
    so the 30 or so images of it, CLASS/TRACK_FRAME.ppm, are much alike."""
    numbers: dict[tuple[str, str], int] = {}
    folders_and_names = (os.path.split(path) for paths in files.values() for path in paths)
    signs = ((folder, name.rpartition("_")[0] or name) for folder, name in folders_and_names)
    return torch.tensor([numbers.setdefault(sign, len(numbers)) for sign in signs], dtype=torch.int64)


def test_files(folder: Path, listing: Path) -> dict[str, list[str]]:
    """The images in `folder` by the class that the file `listing` gives them: {class: paths}, by number and name.

    UserError: no such list, or one that is damaged; an image that is not there, is not listed, or is listed twice.
    """
    if not listing.is_file():
        raise UserError(f"{listing} is missing: it says which class the images in {folder} have; it comes with "
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
    """File and class of each image that a list names."""
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
    return UserError(f"{image} is missing, but {listing} lists it: unpack its archive again")
