"""CIFAR, Fashion-MNIST and the demo are read as uint8 tensors; damaged files give a one-line error."""

import hashlib
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from dataset_helpers import fails, noise, sound

from utils import datasets
from utils.datasets import DATASETS, load_dataset

CIFAR_NAMES = {
    "cifar10": ("CIFAR10", "labels", "label_names"),
    "cifar100": ("CIFAR100", "fine_labels", "fine_label_names"),
}


# --- names ---

def test_an_unknown_name_lists_the_choices(tmp_path):
    message = fails("cifar1O", tmp_path)
    assert "'cifar1O'" in message and "did you mean 'cifar10'?" in message
    assert all(name in message for name in (*DATASETS, "folder:PATH"))
    assert "did you mean" not in fails("imagenet-21k-winter", tmp_path)


# --- CIFAR ---

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write tiny files in CIFAR's format and patch torchvision's MD5 sums. Returns images (N, 3, 32, 32) by file."""

    def write(name: str) -> tuple[type, Path, dict[str, np.ndarray]]:
        torchvision_name, labels, class_names = CIFAR_NAMES[name]
        source = getattr(torchvision.datasets, torchvision_name)
        folder = tmp_path / f"data-{name}" / source.base_folder
        folder.mkdir(parents=True)
        images = {}

        def store(file: str, content: dict) -> str:
            (folder / file).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        def part(files: list) -> list:
            stored = []
            for seed, (file, _) in enumerate(files):
                images[file] = noise(4, 3, 32, 32, seed=seed)
                stored.append([file, store(file, {"data": images[file].reshape(4, -1), labels: [0, 2, 1, 2]})])
            return stored

        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(source, attribute, part(getattr(source, attribute)))
        md5 = store(source.meta["filename"], {class_names: ["apple", "bear", "cup"]})
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5})
        return source, folder, images

    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_equals_that_of_torchvision(name, cifar, tmp_path):
    source, folder, images = cifar(name)
    dataset = load_dataset(name, tmp_path)
    assert sound(dataset) and dataset.name == name
    assert dataset.classes == ("apple", "bear", "cup") and dataset.num_classes == 3 and dataset.image_size == 32
    assert dataset.mean == (0.4914, 0.4822, 0.4465) and dataset.std == (0.2023, 0.1994, 0.2010)
    assert dataset.augmentation == "crop_flip"
    for train, pixels, labels in ((True, dataset.train_images, dataset.train_labels),
                                  (False, dataset.test_images, dataset.test_labels)):
        expected = source(folder.parent, train=train)
        assert np.array_equal(pixels, expected.data) and labels.tolist() == expected.targets
    first = source.train_list[0][0]
    assert np.array_equal(dataset.train_images[:4], images[first].transpose(0, 2, 3, 1))


def test_an_existing_cifar_is_not_downloaded(cifar, tmp_path, monkeypatch):
    source, _, _ = cifar("cifar10")
    monkeypatch.setattr(source, "download", lambda self: pytest.fail("downloaded"))
    load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_the_layout_of_torchvision_is_found(name, cifar, tmp_path, monkeypatch):
    source, folder, _ = cifar(name)
    expected = load_dataset(name, tmp_path).train_images
    monkeypatch.setattr(source, "download", lambda self: pytest.fail("downloaded"))
    folder.rename(tmp_path / folder.name)
    assert torch.equal(load_dataset(name, tmp_path).train_images, expected)
    assert list(folder.parent.iterdir()) == []


def test_an_archive_of_cifar_in_the_data_directory_is_unpacked_there(cifar, tmp_path, monkeypatch):
    source, folder, _ = cifar("cifar10")
    expected = load_dataset("cifar10", tmp_path).train_images
    archive = tmp_path / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (folder / "test_batch").unlink()
    assert torch.equal(load_dataset("cifar10", tmp_path).train_images, expected)
    assert (tmp_path / source.base_folder / "test_batch").exists()


def test_a_missing_cifar_is_unpacked_from_its_archive(cifar, tmp_path, monkeypatch):
    source, folder, _ = cifar("cifar100")
    before = load_dataset("cifar100", tmp_path)
    archive = folder.parent / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(load_dataset("cifar100", tmp_path).train_images, before.train_images)


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("two\nlines"), TimeoutError()])
def test_a_failed_download_names_the_file_and_its_source(error, cifar, tmp_path, monkeypatch, capsys):
    source, folder, _ = cifar("cifar10")
    (folder / "data_batch_3").unlink()

    def download(self):
        raise error

    monkeypatch.setattr(source, "download", download)
    monkeypatch.setattr(source, "url", "https://somewhere.example/cifar.tar.gz")
    message = fails("cifar10", tmp_path)
    assert message.startswith(f"cifar10: {folder / 'data_batch_3'} is missing")
    assert "https://somewhere.example/cifar.tar.gz" in message and str(folder.parent) in message
    assert " ".join(str(error).split()) in message
    assert "downloading https://somewhere.example/cifar.tar.gz" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_truncated_cifar_file_is_named(file, cifar, tmp_path):
    _, folder, _ = cifar("cifar10")
    (folder / file).write_bytes((folder / file).read_bytes()[:-10])
    message = fails("cifar10", tmp_path)
    assert str(folder / file) in message and "damaged" in message and "delete it" in message


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_cifar_file_that_is_not_the_official_one_is_never_unpickled(cifar, tmp_path):
    _, folder, _ = cifar("cifar10")
    (folder / "test_batch").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert "test_batch is damaged" in fails("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()


# --- Fashion-MNIST and the demo ---

@pytest.fixture
def fashion(tmp_path):
    """Write tiny IDX files. Returns the folder, and images (N, 28, 28) and labels by part."""
    folder = tmp_path / "data-fashion-mnist" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    parts = {}
    for part, count in (("train", 6), ("t10k", 3)):
        images, labels = noise(count, 28, 28), np.arange(count, dtype=np.uint8)
        parts[part] = images, labels
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())
    return folder, parts


def test_fashion_mnist_is_padded_to_32_and_repeated_to_rgb(fashion, tmp_path):
    _, parts = fashion
    dataset = load_dataset("fashion_mnist", tmp_path)
    assert sound(dataset) and dataset.image_size == 32 and dataset.augmentation == "crop_flip"
    assert dataset.mean == (0.2860,) * 3 and dataset.std == (0.3530,) * 3
    assert dataset.classes == tuple(torchvision.datasets.FashionMNIST.classes)
    for part, images, labels in (("train", dataset.train_images, dataset.train_labels),
                                 ("t10k", dataset.test_images, dataset.test_labels)):
        assert all(np.array_equal(images[:, 2:-2, 2:-2, channel], parts[part][0]) for channel in range(3))
        assert images.long().sum() == 3 * parts[part][0].sum(dtype=int)
        assert labels.tolist() == parts[part][1].tolist()


def test_fashion_mnist_in_the_layout_of_torchvision_is_found(fashion, tmp_path, monkeypatch):
    expected = load_dataset("fashion_mnist", tmp_path).train_images
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", lambda self: pytest.fail("downloaded"))
    fashion[0].parent.rename(tmp_path / "FashionMNIST")
    assert torch.equal(load_dataset("fashion_mnist", tmp_path).train_images, expected)


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1],
    lambda raw: raw[:3],
    lambda raw: b"",
    lambda raw: b"x" + raw[1:],
])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_fashion_mnist_file_is_named(file, damage, fashion, tmp_path):
    path = fashion[0] / file
    path.write_bytes(damage(path.read_bytes()))
    message = fails("fashion_mnist", tmp_path)
    assert str(path) in message and "damaged" in message and "delete it" in message


def test_a_failed_download_of_fashion_mnist_names_its_mirror(tmp_path, monkeypatch):
    def download(self):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://mirror.example/"])
    message = fails("fashion_mnist", tmp_path)
    assert "train-images-idx3-ubyte" in message and "http://mirror.example/" in message and "no network" in message


def test_the_demo_data_are_included_and_have_fixed_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("demo", tmp_path / "nowhere")
    assert sound(dataset) and dataset.classes == tuple(torchvision.datasets.FashionMNIST.classes)
    assert dataset.mean == (0.2860,) * 3 and dataset.std == (0.3530,) * 3 and dataset.augmentation == "crop_flip"
    assert dataset.train_labels.bincount().tolist() == [1000] * 10
    assert dataset.test_labels.bincount().tolist() == [200] * 10
    digest = hashlib.sha256()
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        inside = images[:, 2:-2, 2:-2]
        assert inside.long().sum() == images.long().sum(), "the border is not zero"
        assert torch.equal(inside[..., 0], inside[..., 1]) and torch.equal(inside[..., 0], inside[..., 2])
        digest.update(inside[..., 0].contiguous().numpy().tobytes())
        digest.update(labels.to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "04ee362f216e60f0f8dcd3e1353eb374a498528cfa549bd95214654bea2e0922"


def test_the_demo_data_are_small_and_include_their_license():
    assert sum(file.stat().st_size for file in datasets.DEMO_DIR.iterdir()) < 4_500_000
    licence = (datasets.DEMO_DIR / "LICENSE").read_text()
    assert "MIT" in licence and "Copyright (c) 2017 Zalando SE" in licence


@pytest.mark.parametrize("content", [None, b"", b"not xz", lzma.compress(b"not npy"), lzma.compress(bytes(99))[:-9]])
def test_a_damaged_demo_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEMO_DIR", tmp_path)
    if content is not None:
        (tmp_path / "train_images.npy.xz").write_bytes(content)
    assert str(tmp_path / "train_images.npy.xz") in fails("demo", tmp_path)
