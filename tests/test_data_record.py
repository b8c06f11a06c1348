"""Record of a run's data: detection of changed data, and checkpoints trained on other data."""
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import refused, results

from utils import checkpoint, data_record
from utils.checkpoint import Checkpoint
from utils.data import Images
from utils.errors import UserError

MEAN_STD = torch.tensor([0.5, 0.25, 0.125]), torch.ones(3)


def part(count=4, label=0, pixel=7):
    images = torch.zeros(count, 8, 8, 3, dtype=torch.uint8)
    images[-1, 0, 0, 0] = pixel
    return Images(images, torch.full((count,), label), *MEAN_STD)


def record(classes=("a", "b"), size=8, interpolation="bilinear", **parts):
    dataset = SimpleNamespace(classes=classes, image_size=size, interpolation=interpolation)
    return data_record.describe(dataset, parts or {"test": part()})


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


@pytest.mark.parametrize("now, changed", [
    (record(train=part(), test=part()), []),
    (record(train=part(pixel=8), test=part()), ["pixels or labels of train"]),
    (record(train=part(label=1), test=part(label=1)), ["pixels or labels of train, test"]),
    (record(train=part(count=5), test=part()), ["images"]),
    (record(("b", "a"), train=part(), test=part()), ["classes"]),
])
def test_a_change_of_the_data_is_named(now, changed):
    then = record(train=part(), test=part())
    assert data_record.changes(then, now) == changed


def test_records_of_earlier_versions_are_compared_in_part():
    then = without(record(test=part()), "sha256", "image_size")
    assert data_record.changes(then, record(test=part(pixel=8))) == []
    assert data_record.changes(record(("pe\u0302che", "b")), record(("p\u00eache", "b"))) == []


def origin(**content):
    return Checkpoint("teacher.tar", "0", content)


@pytest.mark.parametrize("theirs, ours, difference", [
    (("cat", "dog"), ("dog", "cat"), "its class 0 is 'cat', here 'dog'"),
    (("00", "01", "02", "10"), ("0", "1", "10", "2"), "its class 2 is '02', here '10'"),
    (("Dog", "cat"), ("cat", "dog"), "its class 0 is 'Dog', here 'cat'"),
    (("b", "pe\u0302che"), ("p\u00eache", "b"), "its class 0 is 'b', here 'p\u00eache'"),
])
def test_the_same_classes_in_another_order_are_an_error(theirs, ours, difference):
    with pytest.raises(UserError, match=rf"^adversarial: teacher.tar .* in another order \({difference}\)"):
        data_record.compare_origin(origin(data=record(theirs)), record(ours), "adversarial")


@pytest.mark.parametrize("content, remarks", [
    ({}, []),
    ({"data": "anything"}, []),
    ({"data": {"classes": 3, "mean": ["x"], "std": None}}, []),
    ({"data": record()}, []),
    ({"data": record(("a", "c"))}, ["teacher: trained on classes with other names (its class 1 is 'c', here 'b')"]),
    ({"data": record() | {"mean": [0.5, 0.25, 0.1]}},
     ['teacher: trained with mean [0.5, 0.25, 0.1], here [0.5, 0.25, 0.125] (params.json may set "mean")']),
    ({"data": without(record(), "interpolation")}, []),  # of an earlier version
    ({"data": record(interpolation=None)}, []),  # not a folder
    ({"data": record(interpolation="bicubic")},
     ['teacher: trained on images resized by bicubic, here by bilinear (params.json may set "interpolation")']),
    ({"data": record(size=16)}, ["teacher: trained on images of 16x16 pixels, here 8x8"]),
    ({"data": without(record(), "image_size"), "params": {"dataset": "folder:x", "image_size": 16}},
     ["teacher: trained on images of 16x16 pixels, here 8x8"]),
    ({"data": without(record(), "image_size"), "params": {"dataset": "tiny_imagenet", "image_size": 32}}, []),
])
def test_other_differences_from_the_data_of_a_checkpoint_are_warnings(content, remarks):
    assert data_record.compare_origin(origin(**content), record(), "teacher") == remarks


@pytest.fixture
def mine(data, tmp_path):
    """Copy of the small data set that a test may change."""
    return shutil.copytree(data, tmp_path / "mine")


def exchange(one, other):
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


@pytest.mark.parametrize("where, params, changed", [
    ("train", {}, "changed since this run started (pixels or labels of train)"),
    ("test", {"mean": [0.5] * 3, "std": [0.5] * 3}, "changed since this run started (pixels or labels of test)"),
    ("train", {"validation_fraction": 0.2}, "changed since this run started (pixels or labels of validation, train)"),
])
def test_class_folders_exchanged_under_a_run_are_an_error(call, experiment, mine, where, params, changed):
    directory = experiment(dataset=f"folder:{mine}", num_epochs=1, **params)
    assert call("train_scratch", directory).returncode == 0
    exchange(mine / where / "blue", mine / where / "red")
    assert "already finished" in call("train_scratch", directory).stdout
    assert changed in refused(call, "train_scratch", directory, "--set", "num_epochs=2")


def test_a_run_without_a_data_hash_continues_and_records_it(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    content = checkpoint.load(directory / "last_model.tar").content
    content["data"] = without(content["data"], "sha256", "image_size")
    checkpoint.save(content, directory / "last_model.tar", directory / "best_model.tar")
    assert "already finished" in call("train_scratch", directory).stdout
    assert call("train_scratch", directory, "--set", "num_epochs=2").returncode == 0
    assert results(directory)["data"]["sha256"].keys() == {"test", "train"}


def test_a_poisoned_run_notices_other_images_too(call, experiment, mine):
    directory = experiment(dataset=f"folder:{mine}", num_epochs=1, trigger="badnet_grid", target=1, poison_rate=0.2)
    assert call("train_poisoned", directory).returncode == 0
    assert call("train_poisoned", directory, "--set", "num_epochs=2").returncode == 0
    exchange(mine / "train" / "blue" / "00.png", mine / "train" / "blue" / "01.png")
    line = refused(call, "train_poisoned", directory, "--set", "num_epochs=3")
    assert "pixels or labels of train" in line


@pytest.mark.parametrize("script, role, params", [
    ("train_kd", "teacher", {"teacher_model": "net", "teacher_num_channels": 4, "temperature": 4, "alpha": 0.9}),
    ("train_nasty", "adversarial", {"adversarial_model": "net", "adversarial_num_channels": 4, "temperature": 4,
                                    "weight": 0.01}),
    ("train_scratch", "init_from", {}),
])
def test_every_role_compares_its_checkpoint_with_the_data(call, experiment, mine, script, role, params):
    source = experiment("source", num_epochs=1, mean=[0.3] * 3)
    assert call("train_scratch", source).returncode == 0
    key = "init_from" if role == "init_from" else f"{role}_resume"
    for part in ("train", "test"):
        (mine / part / "blue").rename(mine / part / "sky")
    directory = experiment(dataset=f"folder:{mine}", num_epochs=1, **params, **{key: str(source / "last_model.tar")})
    done = call(script, directory)
    assert done.returncode == 0, done.stderr
    assert f"{role}: trained on classes with other names (its class 0 is 'blue', here 'green')" in done.stdout
    assert f"{role}: trained with mean [0.3, 0.3, 0.3], here" in done.stdout
    assert f"{role}: trained on images" not in done.stdout
    for part in ("train", "test"):
        (mine / part / "sky").rename(mine / part / "blue")
        (mine / part / "red").rename(mine / part / "Red")  # before all names in lower case
    assert "same classes in another order (its class 0 is 'blue', here 'Red')" in refused(call, script, directory,
                                                                                         "--restart")
