"""Data sets come from disk as uint8 tensors, and whatever is wrong with the files is said in one line."""

import hashlib
import io
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
from PIL import Image

from utils import datasets, image_folder
from utils.datasets import DATASET_NAMES, Dataset, load_dataset
from utils.errors import UserError

CIFAR_NAMES = {
    "cifar10": ("CIFAR10", "labels", "label_names"),
    "cifar100": ("CIFAR100", "fine_labels", "fine_label_names"),
}


def fails(name: str, data_dir: Path) -> str:
    """The message of the UserError: one line."""
    with pytest.raises(UserError) as error:
        load_dataset(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def sound(dataset: Dataset) -> bool:
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert images.shape == (len(labels), dataset.image_size, dataset.image_size, 3)
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < dataset.num_classes
    return True


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save_image(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


# --- names ---

def test_an_unknown_name_is_answered_with_the_choices(tmp_path):
    message = fails("cifar1O", tmp_path)
    assert "'cifar1O'" in message and "did you mean 'cifar10'?" in message
    assert all(name in message for name in (*DATASET_NAMES, "folder:PATH"))
    assert "did you mean" not in fails("imagenet-21k-winter", tmp_path)


# --- CIFAR ---

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write tiny files in CIFAR's format and make torchvision's MD5 sums theirs: images (N, 3, 32, 32) by file."""

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
def test_cifar_is_read_as_torchvision_reads_it(name, cifar, tmp_path):
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


def test_a_cifar_that_is_there_is_not_downloaded(cifar, tmp_path, monkeypatch):
    source, _, _ = cifar("cifar10")
    monkeypatch.setattr(source, "download", lambda self: pytest.fail("downloaded"))
    load_dataset("cifar10", tmp_path)


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
def test_a_failed_download_says_what_is_missing_and_how_to_get_it(error, cifar, tmp_path, monkeypatch, capsys):
    source, folder, _ = cifar("cifar10")
    (folder / "data_batch_3").unlink()

    def download(self):
        raise error

    monkeypatch.setattr(source, "download", download)
    monkeypatch.setattr(source, "url", "https://somewhere.example/cifar.tar.gz")
    message = fails("cifar10", tmp_path)
    assert message.startswith(f"cifar10: there is no {folder / 'data_batch_3'}")
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
    """Write tiny IDX files: the folder, the images (N, 28, 28) and labels by part."""
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


def test_the_demo_comes_with_the_code_and_never_changes(tmp_path, monkeypatch):
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


def test_the_demo_is_small_and_carries_its_licence():
    assert sum(file.stat().st_size for file in datasets.DEMO_DIR.iterdir()) < 4_500_000
    licence = (datasets.DEMO_DIR / "LICENSE").read_text()
    assert "MIT" in licence and "Copyright (c) 2017 Zalando SE" in licence


@pytest.mark.parametrize("content", [None, b"", b"not xz", lzma.compress(b"not npy"), lzma.compress(bytes(99))[:-9]])
def test_a_damaged_demo_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEMO_DIR", tmp_path)
    if content is not None:
        (tmp_path / "train_images.npy.xz").write_bytes(content)
    assert str(tmp_path / "train_images.npy.xz") in fails("demo", tmp_path)


# --- Tiny-ImageNet ---

def flat(level: int, shape: tuple[int, ...] = (64, 64, 3)) -> np.ndarray:
    """One grey level all over, which JPEG keeps exactly."""
    return np.full(shape, level, np.uint8)


@pytest.fixture
def tiny(tmp_path):
    """Write two classes; the level of a training image is 10 * class + number, of a test image 100 more."""

    def write(train: str = "{wnid}/images/{wnid}_{n}.JPEG", val: str | None = None) -> Path:
        root = tmp_path / "tiny-imagenet-200"
        lines = []
        for label, wnid in enumerate(["n02", "n10"]):
            for n in range(3):
                grey = (64, 64) if n == 1 else (64, 64, 3)
                save_image(root / "train" / train.format(wnid=wnid, n=n), flat(10 * label + n, grey), quality=95)
            (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("a.JPEG\t0\t0\t10\t10\n")
            for n in range(2):
                file = f"val_{2 * n + 1 - label}.JPEG"
                place = f"images/{file}" if val is None else val.format(wnid=wnid, file=file)
                save_image(root / "val" / place, flat(100 + 10 * label + n), quality=95)
                lines.append(f"{file}\t{wnid}\t0\t0\t62\t62\n")
        if val is None:
            (root / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
        return root

    return write


@pytest.mark.parametrize("val", [None, "{wnid}/{file}", "{wnid}/images/{file}"])
@pytest.mark.parametrize("train", ["{wnid}/images/{wnid}_{n}.JPEG", "{wnid}/{wnid}_{n}.JPEG"])
def test_tiny_imagenet_is_read_raw_and_sorted(train, val, tiny, tmp_path):
    tiny(train, val)
    dataset = load_dataset("tiny_imagenet", tmp_path, image_size=32)
    assert sound(dataset) and dataset.image_size == 64 and dataset.augmentation == "rotate_flip"
    assert dataset.classes == ("n02", "n10")
    assert dataset.mean == (0.4802, 0.4481, 0.3975) and dataset.std == (0.2302, 0.2265, 0.2262)
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train_images[:, 32, 32].tolist() == [[level] * 3 for level in (0, 1, 2, 10, 11, 12)]
    assert dataset.test_labels.tolist() == [0, 0, 1, 1]
    assert dataset.test_images[:, 32, 32].tolist() == [[level] * 3 for level in (100, 101, 110, 111)]


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_tiny_imagenet_says_where_to_get_it(part, tiny, tmp_path):
    root = tiny()
    (root / part).rename(root / "elsewhere")
    message = fails("tiny_imagenet", tmp_path)
    assert str(root / part) in message and "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in message


def test_unsorted_val_images_need_their_annotations(tiny, tmp_path):
    annotations = tiny() / "val" / "val_annotations.txt"
    annotations.unlink()
    assert fails("tiny_imagenet", tmp_path).startswith(f"{annotations} is missing")


def test_every_val_image_is_listed_and_every_listed_one_is_there(tiny, tmp_path):
    val = tiny() / "val"
    (val / "images" / "val_2.JPEG").rename(val / "images" / "other.JPEG")
    assert f"{val / 'images' / 'val_2.JPEG'} is missing" in fails("tiny_imagenet", tmp_path)
    save_image(val / "images" / "val_2.JPEG", flat(0))
    assert f"{val / 'images' / 'other.JPEG'} has no class" in fails("tiny_imagenet", tmp_path)


@pytest.mark.parametrize(("line", "words"), [("val_9.JPEG\tn99\t0\t0\n", "class 'n99'"), ("val_9.JPEG\n", "line 5")])
def test_a_val_image_of_no_known_class_is_named(line, words, tiny, tmp_path):
    val = tiny() / "val"
    save_image(val / "images" / "val_9.JPEG", flat(0))
    with open(val / "val_annotations.txt", "a") as file:
        file.write(line)
    message = fails("tiny_imagenet", tmp_path)
    assert words in message and "val_9.JPEG" in message


def test_a_sorted_val_folder_of_no_known_class_is_named(tiny, tmp_path):
    root = tiny(val="{wnid}/{file}")
    (root / "val" / "n10").rename(root / "val" / "n11")
    message = fails("tiny_imagenet", tmp_path)
    assert "class 'n11'" in message and str(root / "train") in message


def test_a_class_without_images_is_named(tiny, tmp_path):
    root = tiny()
    (root / "train" / "n50" / "images").mkdir(parents=True)
    assert fails("tiny_imagenet", tmp_path).startswith(f"{root / 'train' / 'n50'} holds no image")


# --- folders of images ---

@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for seed, place in enumerate(["train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "test/dog/1.png"]):
        save_image(root / place, noise(40, 56, 3, seed=seed))
    return root


def test_a_folder_becomes_a_data_set_of_the_asked_size(pictures, tmp_path):
    dataset = load_dataset(f"folder:{pictures}", tmp_path, image_size=24)
    assert sound(dataset) and dataset.image_size == 24 and dataset.classes == ("cat", "dog")
    assert dataset.name == f"folder:{pictures}" and dataset.augmentation == "crop_flip"
    assert dataset.train_labels.tolist() == [0, 1, 1] and dataset.test_labels.tolist() == [1]
    with Image.open(pictures / "test" / "dog" / "1.png") as image:
        expected = torchvision.transforms.functional.resize(image, [24, 24], antialias=True)
    assert np.array_equal(dataset.test_images[0], np.asarray(expected))


def test_a_folder_path_is_relative_to_the_current_directory(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("folder:pictures", "data").train_images) == 3


def test_mean_and_std_of_a_folder_are_those_of_its_training_images(pictures, tmp_path):
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    pixels = dataset.train_images.numpy() / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_channel_that_never_varies_gets_a_std_of_one():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    images[0, :, :, 1] = 255
    assert image_folder.mean_and_std(images) == ((0, 0.5, 0), (1, 0.5, 1))


@pytest.mark.parametrize(("held_out", "labels"), [(("test", "val"), [1]), (("val",), [0]), (("test",), [1])])
def test_the_test_images_come_from_test_and_else_from_val(held_out, labels, pictures, tmp_path):
    save_image(pictures / "val" / "cat" / "1.png", noise(8, 8, 3))
    for part in {"test", "val"} - set(held_out):
        (pictures / part).rename(pictures / f"not-{part}")
    assert load_dataset(f"folder:{pictures}", tmp_path).test_labels.tolist() == labels


def test_nested_files_count_and_hidden_ones_do_not(pictures, tmp_path):
    save_image(pictures / "train" / "cat" / "a" / "b" / "9.png", noise(8, 8, 3))
    for hidden in ("train/.ipynb_checkpoints/1.png", "train/cat/.DS_Store", "train/cat/.thumbs/1.png"):
        (pictures / hidden).parent.mkdir(parents=True, exist_ok=True)
        (pictures / hidden).write_bytes(b"no image")
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    assert dataset.classes == ("cat", "dog") and dataset.train_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("file", "image", "expected"), [
    ("grey.png", Image.new("L", (9, 7), 77), (77, 77, 77)),
    ("deep.png", Image.fromarray(np.full((7, 9), 77 * 256 + 5, np.uint16)), (77, 77, 77)),
    ("alpha.png", Image.new("RGBA", (9, 7), (1, 2, 3, 0)), (1, 2, 3)),
    ("palette.gif", Image.new("RGB", (9, 7), (1, 2, 3)).quantize(4), (1, 2, 3)),
    ("transparent.png", Image.new("RGBA", (9, 7), (1, 2, 3, 0)).quantize(4), (1, 2, 3)),
    ("bits.bmp", Image.new("1", (9, 7), 1), (255, 255, 255)),
    ("print.tiff", Image.new("CMYK", (9, 7), (255, 0, 0, 0)), (0, 255, 255)),
    ("colour.ppm", Image.new("RGB", (9, 7), (1, 2, 3)), (1, 2, 3)),
])
def test_every_kind_of_image_becomes_rgb(file, image, expected, pictures, tmp_path):
    (pictures / "test" / "cat").mkdir()
    image.save(pictures / "test" / "cat" / file)
    pixels = load_dataset(f"folder:{pictures}", tmp_path).test_images[0]
    assert (pixels == torch.tensor(expected, dtype=torch.uint8)).all()


def truncated() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(stream, "PNG")
    return stream.getvalue()[:600]


def floating() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


@pytest.mark.parametrize("content", [b"", b"no image", truncated(), floating()])
def test_an_image_that_cannot_be_read_is_named(content, pictures, tmp_path):
    path = pictures / "train" / "dog" / "bad.png"
    path.write_bytes(content)
    assert fails(f"folder:{pictures}", tmp_path).startswith(f"{path} cannot be read as an image")


def test_a_folder_without_its_two_parts_is_told_what_to_look_like(pictures, tmp_path):
    words = "expected a directory PATH with PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE"
    assert words in fails("folder:", tmp_path)
    assert words in fails(f"folder:{tmp_path / 'nowhere'}", tmp_path)
    (pictures / "test").rename(pictures / "holdout")
    assert words in fails(f"folder:{pictures}", tmp_path)


def test_test_classes_have_to_be_training_classes(pictures, tmp_path):
    for name in ("owl", "bee"):
        save_image(pictures / "test" / name / "1.png", noise(8, 8, 3))
    message = fails(f"folder:{pictures}", tmp_path)
    assert message == f"{pictures / 'test'} has classes that {pictures / 'train'} does not have: bee, owl"


def test_folders_without_classes_or_images_are_named(pictures, tmp_path):
    (pictures / "train" / "owl").mkdir()
    assert fails(f"folder:{pictures}", tmp_path).startswith(f"{pictures / 'train' / 'owl'} holds no image")
    (pictures / "test").rename(pictures / "holdout")
    (pictures / "test").mkdir()
    (pictures / "train" / "owl").rmdir()
    assert fails(f"folder:{pictures}", tmp_path) == f"{pictures / 'test'} holds no class folders"


# --- the cache of decoded images ---

@pytest.fixture
def no_decoder(monkeypatch):
    def forbid() -> None:
        monkeypatch.setattr(image_folder.Image, "open", lambda path: pytest.fail(f"{path} was decoded"))

    return forbid


def caches(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "cache").iterdir())


def test_images_are_decoded_once_and_quietly_without_a_terminal(pictures, tmp_path, no_decoder, capsys):
    first = load_dataset(f"folder:{pictures}", tmp_path)
    assert capsys.readouterr().err == ""
    names = [path.name.rsplit("-", 1)[0] for path in caches(tmp_path)]
    assert names == ["folder-pictures-test", "folder-pictures-train"]
    no_decoder()
    second = load_dataset(f"folder:{pictures}", tmp_path)
    assert torch.equal(first.train_images, second.train_images) and torch.equal(first.test_images, second.test_images)
    assert (first.mean, first.std) == (second.mean, second.std)


def test_tiny_imagenet_is_cached_too(tiny, tmp_path, no_decoder):
    tiny()
    first = load_dataset("tiny_imagenet", tmp_path)
    no_decoder()
    assert torch.equal(load_dataset("tiny_imagenet", tmp_path).test_images, first.test_images)


def test_each_size_has_its_own_cache(pictures, tmp_path):
    for size in (32, 16):
        assert load_dataset(f"folder:{pictures}", tmp_path, image_size=size).image_size == size
    assert len(caches(tmp_path)) == 4


def test_a_changed_image_of_the_same_length_is_decoded_anew(pictures, tmp_path):
    path = pictures / "test" / "cat" / "1.bmp"
    save_image(path, flat(100))
    load_dataset(f"folder:{pictures}", tmp_path)
    before = path.stat()
    save_image(path, flat(200))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert path.stat().st_size == before.st_size
    assert (load_dataset(f"folder:{pictures}", tmp_path).test_images[0] == 200).all()


def stored(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-100],
    lambda raw: raw[:50],
    lambda raw: b"",
    lambda raw: b"garbage" * 100,
    lambda raw: pickle.dumps({"not": "an array"}),
    lambda raw: stored(noise(3, 8, 8, 3)),
    lambda raw: stored(np.zeros((3, 32, 32, 3))),
])
def test_a_cache_that_cannot_be_read_is_made_again(damage, pictures, tmp_path):
    expected = load_dataset(f"folder:{pictures}", tmp_path).train_images
    cache = caches(tmp_path)[1]
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert torch.equal(load_dataset(f"folder:{pictures}", tmp_path).train_images, expected)
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_one_warning(pictures, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the directory should be")
    for _ in range(2):
        assert len(load_dataset(f"folder:{pictures}", tmp_path).train_images) == 3
    assert capsys.readouterr().err.count(f"warning: {tmp_path / 'cache'} cannot be written") == 1


def test_a_full_disk_leaves_no_half_written_cache(pictures, tmp_path, monkeypatch, capsys):
    def save(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_folder.np, "save", save)
    assert len(load_dataset(f"folder:{pictures}", tmp_path).train_images) == 3
    assert caches(tmp_path) == []
    assert "No space left on device" in capsys.readouterr().err
