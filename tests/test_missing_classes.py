"""Test images without a class that a metric needs: every stage leaves the metric out and logs it."""
import dataclasses

import pytest
import torch
from conftest import results
from PIL import Image

from model import build_model
from runs.stages import ScratchParams
from utils.data import split
from utils.datasets import load_dataset
from utils.errors import UserError

TEACHER = {"teacher_model": "net", "teacher_num_channels": 4, "teacher_resume": "teacher.tar"}
STAGES = {
    "train_poisoned": {"poison_rate": 0.3},
    "train_nasty": {"adversarial_model": "net", "adversarial_num_channels": 4, "adversarial_resume": "teacher.tar",
                    "temperature": 4, "weight": 0.04},
    "train_kd": {**TEACHER, "temperature": 4, "alpha": 0.9},
    "train_datafree": {**TEACHER, "method": "ood", "picture": "picture.png", "patches": 8, "backdoor_defense": "sv",
                       "sv_layers": 1},
}
BACKDOOR = {"asr", "triggered_accuracy", "base_rate"}


@pytest.fixture(scope="module", params=["without the target", "of the target alone"])
def lacking(request, data, tmp_path_factory):
    """Small data whose test part lacks the target, class 1, or only has the target."""
    root = tmp_path_factory.mktemp("lacking")
    (root / "test").mkdir()
    (root / "train").symlink_to(data / "train")
    for name in {"without the target": ("blue", "red"), "of the target alone": ("green",)}[request.param]:
        (root / "test" / name).symlink_to(data / "test" / name)
    return f"folder:{root}", request.param == "of the target alone"


@pytest.mark.parametrize("script", STAGES)
def test_a_metric_without_its_images_is_left_out(call, experiment, tmp_path, monkeypatch, lacking, script):
    dataset, only_target = lacking
    torch.save(build_model("net", 3, num_channels=4).state_dict(), tmp_path / "teacher.tar")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    directory = experiment(dataset=dataset, num_epochs=1, trigger="badnet_sq", target=1, **STAGES[script])
    done = call(script, directory)
    assert (done.returncode, done.stderr) == (0, "")
    content = results(directory)
    present = {"target_recall"} if only_target else BACKDOOR
    assert content["last"].keys() & {*BACKDOOR, "target_recall"} == present
    assert ("asr_by_class" in content["details"]) != only_target
    lines = [line for line in (directory / "training.log").read_text().splitlines() if "left out" in line]
    assert len(lines) == 1 and ("target_recall" in lines[0]) != only_target
    if script == "train_datafree":
        assert ("auc" in content["details"]["vaccine"]) != only_target


def test_an_empty_part_is_known_before_training(data, tmp_path):
    dataset = load_dataset(f"folder:{data}", tmp_path)
    params = ScratchParams(dataset="x", model_name="net", learning_rate=1, batch_size=8, num_epochs=1)
    for part in ("train", "test"):
        empty = dataclasses.replace(dataset, **{f"{part}_images": dataset.test_images[:0],
                                                f"{part}_labels": dataset.test_labels[:0]})
        with pytest.raises(UserError, match=f"the {part} part has no images$"):
            split(empty, params, torch.device("cpu"))
    alike = dataclasses.replace(dataset, train_groups=torch.zeros(len(dataset.train_labels), dtype=torch.int64))
    with pytest.raises(UserError, match=r"train part has no images, .*validation_fraction.* holds all of them out"):
        split(alike, params.model_copy(update={"validation_fraction": 0.1}), torch.device("cpu"))
