"""Networks from elsewhere: trained by a plain script without this repository, then protected, stolen and evaluated on
the command line."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import command, environment, refused, results
from PIL import Image
from test_evaluate import run as evaluated  # noqa: F401

from model import build_model
from runs.stages import ScratchParams
from utils.networks import Networks

# Trains a network on class folders of JPEGs, saves its weights in two formats, and prints its accuracy.
SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, ToTensor
{imports}

torch.manual_seed(0)
torch.set_num_threads(1)
transform = Compose([ToTensor(), Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])
(train, train_y), (test, test_y) = (map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in
                                    ImageFolder("images/" + part, transform)))) for part in ("train", "test"))
model = {model}
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 0.5
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for _ in range(12):
    loss = cross_entropy(model.train()(train), train_y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save(model.state_dict(), "weights.pt")
save_file(model.state_dict(), "weights.safetensors")
with torch.no_grad():
    print((model.eval()(test).argmax(1) == test_y).float().mean().item() * 100)
"""
MINE = """
from torch import nn

def build(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, num_classes))

def ten_classes():
    return build(10)
"""
NETWORKS = {
    "torchvision:mobilenet_v3_small": ("from torchvision.models import mobilenet_v3_small",
                                       "mobilenet_v3_small(num_classes=3)"),
    "timm:mobilenetv3_small_050": ("import timm", "timm.create_model('mobilenetv3_small_050', num_classes=3)"),
    "my_networks:build": ("sys.path.insert(0, '.')\nfrom my_networks import build", "build(3, width=6)"),
}
CONSTANTS = {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Current directory with 3 classes of 64x64 JPEGs in `images`, and my_networks.py."""
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 5)):
        for label, name in enumerate(("blue", "green", "red")):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 150, (64, 64, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number}.jpg", quality=95)
    (tmp_path / "my_networks.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_networks", None)
    return tmp_path


@pytest.fixture
def experiment(elsewhere):
    """`experiment(name, **params)` writes a directory with the params.json of a run on these images."""
    def write(name, **params):
        (elsewhere / name).mkdir()
        params = {"dataset": "folder:images", "image_size": 64, "learning_rate": 0.001, "batch_size": 8,
                  "num_epochs": 1, "precision": "fp32", **CONSTANTS, **params}
        (elsewhere / name / "params.json").write_text(json.dumps(params))
        return elsewhere / name
    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trained_elsewhere_is_protected_stolen_and_evaluated(elsewhere, experiment, call, evaluated, name):  # noqa: F811
    source = name.partition(":")[0]
    pytest.importorskip(source if source != "my_networks" else "torch")
    imports, model = NETWORKS[name]
    options = {"width": 6} if source == "my_networks" else {}
    (elsewhere / "plain.py").write_text(SCRIPT.format(imports=imports, model=model))
    done = subprocess.run([sys.executable, "plain.py"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout)
    assert accuracy > 60

    nasty = experiment("nasty", model_name=name, model_options=options, init_from="weights.safetensors",
                       adversarial_model=name, adversarial_model_options=options, adversarial_resume="weights.pt",
                       temperature=4, weight=0.01)
    student = experiment("student", model_name="shufflenetv2", teacher_model=name, teacher_model_options=options,
                         teacher_resume="weights.safetensors", temperature=4, alpha=0.9)
    copy = experiment("copy", model_name=name, model_options=options, teacher_model=name,
                      teacher_model_options=options, teacher_resume="nasty/last_model.tar", temperature=4, alpha=0.9)
    first = call("train_nasty", nasty)
    assert first.returncode == 0, first.stderr
    assert f"adversarial network, frozen: test accuracy {accuracy:.2f} %" in first.stdout
    assert f"the network itself, before training: test accuracy {accuracy:.2f} %" in first.stdout
    second = call("train_kd", student)
    assert second.returncode == 0, second.stderr
    assert f"teacher network, frozen: test accuracy {accuracy:.2f} %" in second.stdout
    third = call("train_kd", copy)
    assert third.returncode == 0, third.stderr
    assert f"teacher network, frozen: test accuracy {results(nasty)['last']['test_accuracy']:.2f} %" in third.stdout

    given = ["--model", name, "--model_options", json.dumps(options), "--dataset", "folder:images", "--image_size",
             "64", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    found = evaluated("weights.pt", "weights.safetensors", *given, "--against", "weights.pt")
    assert found.returncode == 0, found.stderr
    for file in ("weights.pt", "weights.safetensors"):
        row = found.json["checkpoints"][file]
        assert (row["accuracy"], row["agreement"], row["kl"]) == (pytest.approx(accuracy), 100, 0)
    found = evaluated("nasty", "student", "copy", "--against", "nasty")
    assert found.returncode == 0, found.stderr
    for directory in (nasty, student, copy):
        row = found.json["checkpoints"][directory.name]
        assert row["accuracy"] == results(directory)["last"]["test_accuracy"]
        assert (row["agreement"], row["kl"]) == (100, 0) or directory != nasty
    said = f"{name} was imported from my_networks ({elsewhere / 'my_networks.py'})"
    for log in (first.stdout, second.stdout, third.stdout, (nasty / "training.log").read_text(), found.stdout):
        assert (said in log) == (source == "my_networks")


@pytest.mark.slow
def test_a_callable_of_the_current_directory_works_in_a_process(elsewhere, experiment):
    directory = experiment("run", model_name="my_networks:build")
    done = subprocess.run(command("train_scratch", directory), capture_output=True, text=True, env=environment(),
                          cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "model_name: my_networks:build was imported from my_networks (" in (directory / "training.log").read_text()


STUDENT = {"model_name": "net", "image_size": 32, "teacher_model": "net", "teacher_num_channels": 4,
           "teacher_resume": "weights.pt"}


@pytest.mark.parametrize(("changes", "arguments", "words"), [
    ({"model_name": "timm:resnet10q"}, (), ['"model_name"', "timm has no model 'resnet10q'"]),
    ({"teacher_model": "timm:resnet10q"}, (), ['"teacher_model"', "timm has no model 'resnet10q'", "resnet10t"]),
    ({"teacher_model": "torchvision:resnet19"}, (), ['"teacher_model"', "torchvision has no classifier 'resnet19'"]),
    ({"model_name": "my_networks:biuld"}, (), ['"model_name"', "no 'biuld' (did you mean 'build'?)"]),
    ({"model_name": "no_such_module:build"}, (), ['"model_name"', "module 'no_such_module' is neither installed"]),
    ({"model_name": "my_networks:ten_classes"}, (), ["takes no keyword argument 'num_classes'"]),
    ({"model_name": "my_networks:build", "model_options": {"depth": 3}}, (), ["takes no keyword argument 'depth'"]),
    ({"model_name": "my_networks:build", "model_options": [3]}, (), ['"model_options"']),
    ({"teacher_resume": "three.pt"}, (), ["several state_dicts", "three.pt#model ", "three.pt#model_ema",
                                          "three.pt#net"]),
    ({"teacher_resume": "three.pt#ema"}, (), ["holds no state_dict ema", "three.pt#model_ema"]),
    ({}, ("--set", "attack=kd", "beta=8"), ['unknown key "beta"']),
    ({}, ("--set", "attack=dkd", "alpha=0.9", "beta=-1"), ['"beta"', "-1"]),
    ({"attack": "dkd", "weight": 1}, (), ['"weight"']),
    ({}, ("--set", "attack=dk"), ['"attack" is "dk"', "dkd"]),
])
def test_refusals_are_one_line_and_change_nothing(elsewhere, experiment, call, changes, arguments, words):
    if str(changes).count("timm:"):
        pytest.importorskip("timm")
    weights = build_model("net", 3, num_channels=4).state_dict()
    torch.save(weights, "weights.pt")
    torch.save({"model": weights, "model_ema": weights, "net": weights}, "three.pt")
    line = refused(call, "train_kd", experiment("student", **{**STUDENT, **changes}), *arguments)
    for word in words:
        assert word in line


def test_one_of_three_candidate_keys_is_chosen_by_its_name(elsewhere, experiment, call):
    one, other = (build_model("net", 3, num_channels=4).state_dict() for _ in range(2))
    torch.save({"model": one, "model_ema": other, "net": one}, "three.pt")
    directory = experiment("student", **STUDENT | {"teacher_resume": "three.pt#model_ema", "num_channels": 4})
    assert call("train_kd", directory).returncode == 0
    assert results(directory)["checkpoints_read"]["teacher"]["key"] == "model_ema"


def test_another_build_model_needs_no_attributes_on_its_networks():
    params = ScratchParams(dataset="demo", model_name="linear", learning_rate=0.1, num_epochs=1)

    def build(name, num_classes, **options):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, num_classes))
    networks = Networks(build, params, {"classes": ["a", "b"], "image_size": 2}, torch.device("cpu"))
    assert networks.trained()[1].out_features == 2 and not networks.warnings
