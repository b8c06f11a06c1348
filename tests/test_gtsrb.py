"""GTSRB: archives in the official layout are read in a fixed order; damaged or missing files give a one-line error."""

import io
import shutil
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import results
from dataset_helpers import fails, noise, save_image, sound
from PIL import Image

from runs.stages import ScratchParams
from utils import gtsrb, image_folder
from utils.data import training_index
from utils.datasets import Dataset, load_dataset

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
TEST_LABELS = [16, 1, 38, 0, 42, 1]


class Archive:
    """Directories of an unpacked data set with two training images per class."""

    def __init__(self, data_dir: Path) -> None:
        self.base = data_dir / "data-gtsrb" / "gtsrb"
        self.train, self.test = self.base / "GTSRB" / "Training", self.base / "GTSRB" / "Final_Test" / "Images"
        self.listing = self.base / "GT-final_test.csv"

    def image(self, path: Path, seed: int, label: int) -> str:
        """Write an image with sides of 20 to 40 pixels. Returns its line in a list."""
        height, width = 20 + seed % 21, 20 + 7 * seed % 21
        save_image(path, noise(height, width, 3, seed=seed))
        return f"{path.name};{width};{height};5;5;{width - 5};{height - 5};{label}"

    def write_train(self, root: Path, seed: int = 0) -> None:
        for label in range(43):
            folder = root / f"{label:05d}"
            lines = [self.image(folder / f"0000{n}_00000.ppm", seed + 2 * label + n, label) for n in range(2)]
            self.write_list(folder / f"GT-{label:05d}.csv", lines)

    def write_test(self) -> None:
        self.lines = [self.image(self.test / f"0000{n}.ppm", 100 + n, label) for n, label in enumerate(TEST_LABELS)]
        self.write_list(self.listing, self.lines)

    def write_list(self, path: Path, lines: list[str]) -> None:
        path.write_bytes("\r\n".join([HEADER, *lines, ""]).encode("latin-1"))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    archive = Archive(tmp_path)
    archive.write_train(archive.train)
    archive.write_test()
    monkeypatch.setattr(torchvision.datasets.GTSRB, "download", lambda self: pytest.fail("downloaded"))
    return archive


def scaled(source) -> np.ndarray:
    with Image.open(source) as image:
        return np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))


def pairs(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[bytes, int]]:
    return sorted((image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))


def parts(dataset: Dataset) -> tuple[list, list]:
    return pairs(dataset.train_images, dataset.train_labels), pairs(dataset.test_images, dataset.test_labels)


# --- reading ---

def test_the_images_and_labels_are_those_of_torchvision_scaled_to_32(archive, tmp_path):
    dataset = load_dataset("gtsrb", tmp_path)
    assert sound(dataset) and dataset.name == "gtsrb" and dataset.image_size == 32
    assert dataset.mean == (0.3403, 0.3121, 0.3214) and dataset.std == (0.2724, 0.2608, 0.2669)
    assert dataset.augmentation == "crop"
    for split, found in zip(("train", "test"), parts(dataset), strict=True):
        samples = torchvision.datasets.GTSRB(archive.base.parent, split=split)._samples
        assert found == sorted((scaled(path).tobytes(), label) for path, label in samples)


def test_archives_in_the_layout_of_torchvision_are_found(archive, tmp_path):
    expected = load_dataset("gtsrb", tmp_path)
    archive.base.rename(tmp_path / "gtsrb")
    assert parts(load_dataset("gtsrb", tmp_path)) == parts(expected)


def test_each_of_the_43_classes_has_a_name_of_its_own(archive, tmp_path):
    dataset = load_dataset("gtsrb", tmp_path)
    assert dataset.num_classes == len(set(dataset.classes)) == 43
    assert [dataset.classes[label] for label in (1, 14, 40)] == ["Speed limit 30", "Stop", "Roundabout"]


def test_the_training_images_are_in_one_order_that_mixes_the_classes(archive, tmp_path):
    first, second = load_dataset("gtsrb", tmp_path), load_dataset("gtsrb", tmp_path)
    labels = first.train_labels
    assert torch.equal(first.train_images, second.train_images) and torch.equal(labels, second.train_labels)
    assert labels.bincount().tolist() == [2] * 43
    assert len(labels[:43].unique()) > 22 and labels[:5].tolist() == [7, 21, 19, 22, 31]


def test_the_published_training_images_are_preferred(archive, tmp_path):
    archive.write_train(archive.base / "GTSRB" / "Final_Training" / "Images", seed=7)
    expected = scaled(archive.base / "GTSRB" / "Final_Training" / "Images" / "00042" / "00001_00000.ppm")
    assert (expected.tobytes(), 42) in parts(load_dataset("gtsrb", tmp_path))[0]
    archive.train.rename(archive.train.with_name("elsewhere"))
    assert len(load_dataset("gtsrb", tmp_path).train_images) == 86


def test_the_frames_of_one_sign_are_held_out_together(archive, tmp_path):
    frames = {}  # one picture per sign, with two or three frames
    for number, path in enumerate(sorted(archive.train.glob("*/*_00000.ppm"))):
        for frame in range(1, 2 + number % 2):
            shutil.copy(path, path.with_name(path.name.replace("_00000", f"_0000{frame}")))
        frames[scaled(path).tobytes()] = number
    dataset = load_dataset("gtsrb", tmp_path)
    signs = torch.tensor([frames[image.numpy().tobytes()] for image in dataset.train_images])
    assert dataset.train_groups.unique().tolist() == list(range(86))
    assert {(sign, group) for sign, group in zip(signs.tolist(), dataset.train_groups.tolist(), strict=True)} == {
        (sign, sign) for sign in range(86)}
    for fraction in (1.0, 0.5):
        params = ScratchParams(dataset="gtsrb", model_name="net", learning_rate=0.1, num_epochs=1,
                               validation_fraction=0.25, subset_fraction=fraction)
        index = training_index(dataset, params)
        used = sum(map(len, index.values()))
        assert used == round(fraction * len(signs)) and 0 <= len(index["validation"]) - used / 4 <= 3
        seen, held_out = (set(signs[index[name]].tolist()) for name in ("train", "validation"))
        assert not seen & held_out


def test_a_file_name_without_a_track_is_its_own_sign():
    files = {"a": ["/my_data/0/1.ppm", "/my_data/0/2_0.ppm", "/my_data/0/2_1.ppm"], "b": ["/my_data/1/2_0.ppm"]}
    assert gtsrb.tracks(files).tolist() == [0, 1, 1, 2]


def test_training_images_do_not_need_lists(archive, tmp_path):
    expected = parts(load_dataset("gtsrb", tmp_path))
    for path in archive.train.glob("*/*.csv"):
        path.unlink()
    assert parts(load_dataset("gtsrb", tmp_path)) == expected


def test_images_of_signs_are_decoded_once(archive, tmp_path, monkeypatch):
    first = load_dataset("gtsrb", tmp_path)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache").iterdir())
    assert names == ["gtsrb-test", "gtsrb-train"]
    monkeypatch.setattr(image_folder.Image, "open", lambda path: pytest.fail(f"{path} was decoded"))
    assert torch.equal(load_dataset("gtsrb", tmp_path).train_images, first.train_images)


def test_a_network_learns_signs(call, experiment, tmp_path):
    archive = Archive(tmp_path / "data")
    archive.write_train(archive.train)
    archive.write_test()
    directory = experiment(dataset="gtsrb", num_epochs=1)
    done = call("train_scratch", directory)
    assert done.returncode == 0, done.stderr
    assert "gtsrb: 43 classes, images: 6 test, 86 train" in done.stdout
    assert results(directory)["data"]["classes"] == list(gtsrb.CLASSES)


def test_without_training_images_the_test_images_are_enough(archive, tmp_path):
    expected = parts(load_dataset("gtsrb", tmp_path))[1]
    archive.train.rename(tmp_path / "elsewhere")
    dataset = load_dataset("gtsrb", tmp_path, training=False)
    assert parts(dataset) == ([], expected) and dataset.image_size == 32


# --- download ---

@pytest.mark.parametrize("missing", ["Training", "Final_Test"])
def test_missing_files_are_downloaded_and_unpacked(missing, archive, tmp_path, monkeypatch, capsys):
    expected = parts(load_dataset("gtsrb", tmp_path))
    contents = {
        "GTSRB-Training_fixed.zip": list(archive.train.rglob("*.*")),
        "GTSRB_Final_Test_Images.zip": list(archive.test.iterdir()),
        "GTSRB_Final_Test_GT.zip": [archive.listing],
    }
    archives = {}
    for name, paths in contents.items():
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            for path in paths:
                file.write(path, path.relative_to(archive.base))
        archives[name] = stream.getvalue()
    (archive.base / "GTSRB" / missing).rename(archive.base / "elsewhere")
    if missing == "Final_Test":
        archive.listing.unlink()
    fetched = []

    def unpack(url: str, download_root: str, md5: str) -> None:
        fetched.append(url)
        zipfile.ZipFile(io.BytesIO(archives[url.rsplit("/", 1)[1]])).extractall(download_root)

    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets.gtsrb, "download_and_extract_archive", unpack)
    assert parts(load_dataset("gtsrb", tmp_path)) == expected
    wanted = {"Training": ["GTSRB-Training_fixed.zip"],
              "Final_Test": ["GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip"]}[missing]
    assert fetched == [f"{gtsrb.URL}/{name}" for name in wanted]
    assert f"downloading {gtsrb.URL}" in capsys.readouterr().err


def test_a_failed_download_names_the_file_and_its_source(archive, tmp_path, monkeypatch):
    def download(self):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.GTSRB, "download", download)
    archive.train.rename(archive.train.with_name("elsewhere"))
    message = fails("gtsrb", tmp_path)
    assert message.startswith(f"gtsrb: {archive.train} is missing")
    assert gtsrb.URL in message and "no route to host" in message
    assert "download GTSRB_Final_Training_Images.zip" in message and f" unpack into {archive.base}" in message


# --- damaged or missing files ---

@pytest.mark.parametrize("part", ["train", "test"])
def test_a_truncated_image_is_named(part, archive, tmp_path):
    path = {"train": archive.train / "00017" / "00001_00000.ppm", "test": archive.test / "00003.ppm"}[part]
    path.write_bytes(path.read_bytes()[:-10])
    assert fails("gtsrb", tmp_path).startswith(f"{path} cannot be read as an image")


def test_a_missing_list_of_test_labels_is_named(archive, tmp_path):
    archive.listing.unlink()
    message = fails("gtsrb", tmp_path)
    assert message.startswith(f"{archive.listing} is missing") and "GTSRB_Final_Test_GT.zip" in message


def test_a_listed_image_that_is_missing_is_named(archive, tmp_path):
    for path, listing in ((archive.test / "00002.ppm", archive.listing),
                          (archive.train / "00009" / "00000_00000.ppm", archive.train / "00009" / "GT-00009.csv")):
        path.unlink()
        assert fails("gtsrb", tmp_path).startswith(f"{path} is missing, but {listing} lists it")


def test_a_test_image_without_a_class_or_with_two_is_named(archive, tmp_path):
    archive.write_list(archive.listing, archive.lines[:-1])
    assert fails("gtsrb", tmp_path).startswith(f"{archive.test / '00005.ppm'} has no class")
    archive.write_list(archive.listing, [*archive.lines, archive.lines[0]])
    assert fails("gtsrb", tmp_path).startswith(f"{archive.listing} lists 00000.ppm twice")


@pytest.mark.parametrize("line", [
    "00000.ppm;30;30;5;5;25;25;43",
    "00000.ppm;30;30;5;5;25;25;-1",
    "00000.ppm;30;30;5;5;25;25;",
    "00000.ppm,30,30,5,5,25,25,16",
    "00000.ppm",
    ";;;;;;;3",
    '"00000\r\n.ppm";30;30;5;5;25;25;16',
    "\0\x80",
])
def test_a_line_without_image_and_class_is_named(line, archive, tmp_path):
    archive.write_list(archive.listing, [line, *archive.lines[1:]])
    assert fails("gtsrb", tmp_path).startswith(f"{archive.listing}, line 2: ")


def test_a_list_without_its_columns_is_named(archive, tmp_path):
    archive.listing.write_text("00000.ppm;16\n00001.ppm;1\n")
    message = fails("gtsrb", tmp_path)
    assert str(archive.listing) in message and "Filename" in message and "ClassId" in message


def test_a_class_folder_that_is_missing_or_empty_or_of_no_class_is_named(archive, tmp_path):
    (archive.train / "00017").rename(archive.train / "00043")
    assert fails("gtsrb", tmp_path).startswith(f"{archive.train / '00017'} is missing")
    (archive.train / "00017").mkdir()
    assert fails("gtsrb", tmp_path).startswith(f"{archive.train / '00017'} holds no image")
    save_image(archive.train / "00017" / "1.ppm", noise(20, 20, 3))
    assert fails("gtsrb", tmp_path).startswith(f"{archive.train / '00043'} is no class of GTSRB")
