"""Image folders, including Tiny-ImageNet, and the cache of decoded images."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import refused, results
from dataset_helpers import fails, noise, save_image, sound
from PIL import ExifTags, Image, ImageOps

from utils import image_folder
from utils.datasets import load_dataset
from utils.image_folder import Decoding

# --- Tiny-ImageNet ---

def flat(level: int, shape: tuple[int, ...] = (64, 64, 3)) -> np.ndarray:
    """Uniform gray image, which JPEG preserves exactly."""
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
    dataset = load_dataset("tiny_imagenet", tmp_path, Decoding(32))
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


def test_val_images_and_their_annotations_must_match(tiny, tmp_path):
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
    dataset = load_dataset(f"folder:{pictures}", tmp_path, Decoding(24))
    assert sound(dataset) and dataset.image_size == 24 and dataset.classes == ("cat", "dog")
    assert dataset.name == f"folder:{pictures}" and dataset.augmentation == "crop_flip"
    assert dataset.train_labels.tolist() == [0, 1, 1] and dataset.test_labels.tolist() == [1]
    with Image.open(pictures / "test" / "dog" / "1.png") as image:
        expected = torchvision.transforms.functional.resize(image, [24, 24], antialias=True)
    assert np.array_equal(dataset.test_images[0], np.asarray(expected))


@pytest.mark.parametrize("name", ["nearest", "bicubic", "lanczos"])
def test_images_are_resized_by_the_filter_asked_for(name, pictures, tmp_path):
    load_dataset(f"folder:{pictures}", tmp_path, Decoding(24))  # the cache of another filter is not read
    dataset = load_dataset(f"folder:{pictures}", tmp_path, Decoding(24, interpolation=name))
    with Image.open(pictures / "test" / "dog" / "1.png") as image:
        expected = torchvision.transforms.functional.resize(
            image, [24, 24], torchvision.transforms.InterpolationMode(name), antialias=True)
    assert np.array_equal(dataset.test_images[0], np.asarray(expected))


def test_classes_without_test_images_are_named(pictures, tmp_path):
    assert load_dataset(f"folder:{pictures}", tmp_path).warnings == ("classes without test images: cat",)


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
    ("alpha.png", Image.new("RGBA", (9, 7), (1, 2, 3, 0)), (255, 255, 255)),
    ("palette.gif", Image.new("RGB", (9, 7), (1, 2, 3)).quantize(4), (1, 2, 3)),
    ("transparent.png", Image.new("RGBA", (9, 7), (1, 2, 3, 0)).quantize(4), (255, 255, 255)),
    ("bits.bmp", Image.new("1", (9, 7), 1), (255, 255, 255)),
    ("print.tiff", Image.new("CMYK", (9, 7), (255, 0, 0, 0)), (0, 255, 255)),
    ("colour.ppm", Image.new("RGB", (9, 7), (1, 2, 3)), (1, 2, 3)),
])
def test_every_kind_of_image_becomes_rgb(file, image, expected, pictures, tmp_path):
    (pictures / "test" / "cat").mkdir()
    image.save(pictures / "test" / "cat" / file)
    pixels = load_dataset(f"folder:{pictures}", tmp_path).test_images[0]
    assert (pixels == torch.tensor(expected, dtype=torch.uint8)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, pictures, tmp_path):
    path, exif = pictures / "test" / "cat" / "1.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    save_image(path, noise(32, 32, 3), exif=exif)
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    with Image.open(path) as image:
        assert np.array_equal(dataset.test_images[0], np.asarray(ImageOps.exif_transpose(image)))
    rotated = "1 of 2 test images: rotated or mirrored by their EXIF orientation"
    assert dataset.warnings == ((rotated,) if orientation > 1 else ())


def test_an_image_with_damaged_exif_is_read(pictures, tmp_path):
    save_image(pictures / "test" / "cat" / "1.jpg", flat(77), exif=b"Exif\0\0garbage")
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    assert (dataset.test_images[0] == 77).all() and dataset.warnings == ()


def transparent_below(mode: str) -> Image.Image:
    """Black image whose lower half is transparent."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16, :, 3] = 255
    image = Image.fromarray(pixels)
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(("file", "image", "options"), [
    ("drawing.png", transparent_below("RGBA"), {}),
    ("grey.png", transparent_below("LA"), {}),
    ("palette.png", transparent_below("P"), {}),
    ("drawing.gif", transparent_below("RGBA"), {}),
    ("color_key.png", Image.fromarray(np.repeat(np.uint8([0, 9]), 16 * 32).reshape(32, 32)), {"transparency": 9}),
    ("deep_key.png", Image.fromarray(np.repeat(np.uint16([0, 9]), 16 * 32).reshape(32, 32)), {"transparency": 9}),
])
def test_transparent_pixels_show_the_background(file, image, options, pictures, tmp_path):
    (pictures / "test" / "cat").mkdir()
    image.save(pictures / "test" / "cat" / file, **options)
    for given, name, level in (({}, "white", 255), ({"background": "#808080"}, "#808080", 128)):
        for _ in range(2):  # decoded, and from the cache
            dataset = load_dataset(f"folder:{pictures}", tmp_path, Decoding(**given))
            assert (dataset.test_images[0, :16] == 0).all() and (dataset.test_images[0, 16:] == level).all()
            assert dataset.warnings == (f"1 of 2 test images: transparent, composed on {name}",)


def test_the_background_of_a_run_is_a_parameter_and_in_its_log(pictures, experiment, call):
    (pictures / "test" / "cat").mkdir()
    transparent_below("RGBA").save(pictures / "test" / "cat" / "1.png")
    directory = experiment(dataset=f"folder:{pictures}", num_epochs=1, background="black")
    assert "1 of 2 test images: transparent, composed on black\n" in call("train_scratch", directory).stdout
    assert 'background (\"black\" -> \"gray\")' in refused(call, "train_scratch", directory, "--set", "background=gray")
    assert '"background" is "grey"' in refused(call, "train_scratch", directory, "--set", "background=grey")


def test_an_opaque_image_with_an_alpha_channel_keeps_its_pixels(pictures, tmp_path):
    pixels = noise(32, 32, 3)
    save_image(pictures / "test" / "cat" / "1.png", np.dstack([pixels, np.full((32, 32), 255, np.uint8)]))
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    assert np.array_equal(dataset.test_images[0], pixels) and dataset.warnings == ()


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
    line = fails(f"folder:{pictures}", tmp_path)
    assert line.startswith(f"{path} cannot be read as an image")
    assert line.count(str(path)) == 1


def test_all_files_that_are_no_images_are_named_at_once(pictures, tmp_path):
    (pictures / "test" / "dog" / "gone.png").symlink_to("nowhere")
    for number in range(11):
        (pictures / "train" / "dog" / f"{number:02d}.csv").write_text("a;b")
    line = fails(f"folder:{pictures}", tmp_path)
    first = pictures / "train" / "dog" / "00.csv"
    assert line.startswith(f"12 files cannot be read as images: {first} (unknown format), ")
    assert "09.csv" in line and "10.csv" not in line and line.endswith(" and 2 more: replace or remove them")
    for path in pictures.glob("train/dog/*.csv"):
        path.unlink()
    assert "gone.png cannot be read as an image (No such file or directory)" in fails(f"folder:{pictures}", tmp_path)


def test_files_and_folders_of_operating_systems_are_left_out(pictures, tmp_path):
    expected = load_dataset(f"folder:{pictures}", tmp_path)
    for stray in ("train/dog/Thumbs.db", "test/dog/desktop.ini", "train/cat/Icon\r", "train/__MACOSX/cat/._1.png"):
        (pictures / stray).parent.mkdir(parents=True, exist_ok=True)
        (pictures / stray).write_bytes(b"no image")
    save_image(pictures / "train" / "cat" / "@eaDir" / "1.png" / "SYNOPHOTO_THUMB_M.jpg", noise(8, 8, 3))
    found = load_dataset(f"folder:{pictures}", tmp_path)
    assert found.classes == expected.classes and torch.equal(found.train_images, expected.train_images)


# --- names of folders ---

NFC, NFD = "p\u00eache", "pe\u0302che"
NOT_UTF_8 = os.fsdecode(b"\xb9\xb7")


def test_class_names_are_unicode_normalized(pictures, tmp_path):
    for place in (f"train/{NFC}", f"test/{NFD}", f"train/{NOT_UTF_8}", f"test/{NOT_UTF_8}"):
        save_image(pictures / place / "1.png", noise(8, 8, 3))
    dataset = load_dataset(f"folder:{pictures}", tmp_path)
    assert dataset.classes == ("\\xb9\\xb7", "cat", "dog", NFC)
    assert dataset.train_labels.tolist() == [0, 1, 2, 2, 3] and dataset.test_labels.tolist() == [0, 2, 3]


def test_two_folders_of_one_class_are_an_error(pictures, tmp_path):
    for name in (NFC, NFD):
        save_image(pictures / "train" / name / "1.png", noise(8, 8, 3))
    line = fails(f"folder:{pictures}", tmp_path)
    assert line.startswith(f"{pictures / 'train'} holds two folders of the class {NFC}")
    assert ascii(NFC) in line and ascii(NFD) in line


def test_a_run_on_names_that_are_not_utf_8_is_finished_once(pictures, tmp_path, experiment, call):
    root = pictures.with_name(NOT_UTF_8)
    for name, label in ((NOT_UTF_8, 0), ("owl", 1)):
        save_image(pictures / "test" / name / "1.png", flat(label))
        save_image(pictures / "train" / name / "1.png", flat(label))
    pictures.rename(root)
    pictures.symlink_to(root)
    directory = experiment(dataset=f"folder:{pictures}", num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert results(directory)["data"]["classes"] == ["\\xb9\\xb7", "cat", "dog", "owl"]
    assert "already finished" in call("train_scratch", directory).stdout


@pytest.mark.parametrize("arguments", [("--set", f"dataset=folder:{NOT_UTF_8}"), ("--resume", f"{NOT_UTF_8}.tar")])
def test_an_argument_that_is_not_utf_8_and_would_be_recorded_is_refused(arguments, experiment, call):
    assert f"argument {arguments[0]}: {arguments[1]!a} is not UTF-8" in refused(
        call, "train_scratch", experiment(), *arguments)


# --- misplaced folders ---

def deepen(part: Path) -> None:
    """PART/CLASS becomes PART/images/CLASS."""
    part.rename(part.with_name("aside"))
    part.mkdir()
    part.with_name("aside").rename(part / "images")


def test_class_folders_a_level_too_deep_are_an_error_that_says_so(pictures, tmp_path):
    train, test = pictures / "train", pictures / "test"
    deepen(test)
    line = fails(f"folder:{pictures}", tmp_path)
    assert line == f"{test} has classes that {train} does not have: images, whose images lie in images/dog"
    deepen(train)
    line = fails(f"folder:{pictures}", tmp_path)
    assert line == (f"{train} holds a single class folder, images: its images lie in images/cat, images/dog, move "
                    "these folders up; expected PATH/train/CLASS/IMAGE")


def test_a_single_class_is_an_error(pictures, tmp_path):
    (pictures / "train" / "cat").rename(tmp_path / "cat")
    line = fails(f"folder:{pictures}", tmp_path)
    assert line.startswith(f"{pictures / 'train'} holds a single class folder, dog: at least two are needed")


def test_sub_folders_of_class_folders_are_warned_about(pictures, tmp_path):
    for name in ("cat/a", "cat/b", "dog/a"):
        save_image(pictures / "train" / name / "9.png", noise(8, 8, 3))
    remark, _ = load_dataset(f"folder:{pictures}", tmp_path).warnings
    assert remark == "images in sub-folders (cat/a, cat/b, dog/a) belong to the class of the outermost folder"


def test_a_path_one_folder_off_names_the_right_one(pictures, tmp_path):
    for path in (pictures / "train", tmp_path):
        line = fails(f"folder:{path}", tmp_path)
        assert line.endswith(f"; did you mean folder:{pictures}?")
    assert "; found: cat, dog; " in fails(f"folder:{pictures / 'train'}", tmp_path)


def test_a_folder_without_its_two_parts_gets_the_expected_layout(pictures, tmp_path):
    words = "expected PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE"
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
    (pictures / "train" / "bee").mkdir()
    assert fails(f"folder:{pictures}", tmp_path).startswith("2 class folders hold no image: ")
    (pictures / "test").rename(pictures / "holdout")
    (pictures / "test").mkdir()
    for name in ("bee", "owl"):
        (pictures / "train" / name).rmdir()
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


def test_a_cache_of_another_decoder_is_not_read(pictures, tmp_path, monkeypatch):
    load_dataset(f"folder:{pictures}", tmp_path)
    monkeypatch.setattr(image_folder, "_DECODING", image_folder._DECODING + 1)
    load_dataset(f"folder:{pictures}", tmp_path)
    assert len(caches(tmp_path)) == 4


def test_each_size_has_its_own_cache(pictures, tmp_path):
    for size in (32, 16):
        assert load_dataset(f"folder:{pictures}", tmp_path, Decoding(size)).image_size == size
    assert len(caches(tmp_path)) == 4


def test_a_changed_image_of_the_same_size_is_decoded_again(pictures, tmp_path):
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
