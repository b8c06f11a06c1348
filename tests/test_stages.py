"""The three stages end to end, and one step of each kind of published experiment."""
import csv
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import COMMITTED, EXPERIMENTS, ROOT, results

from backdoor.triggers import TRIGGER_NAMES
from utils import run as run_module
from utils import seeds
from utils.datasets import Dataset

GOLDEN = json.loads((ROOT / "tests" / "golden" / "experiments.json").read_text())
CHECKPOINTS = ("init_from", "teacher_resume", "adversarial_resume", "surrogate_resume")
CLASSES = {"demo": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "gtsrb": 43}


@pytest.fixture
def chain(call, experiment):
    """Train a teacher, a nasty teacher that starts from it, and a student of each."""
    normal = experiment("normal", num_epochs=6)
    teacher = {"temperature": 4, "num_epochs": 4, "learning_rate": 0.01}
    nasty = experiment("nasty", **teacher, weight=1.0, init_from=str(normal / "best_model.tar"),
                       adversarial_model="net", adversarial_num_channels=4,
                       adversarial_resume=str(normal / "best_model.tar"))
    students = [experiment(f"student_of_{name}", **teacher, alpha=0.9, teacher_model="net", teacher_num_channels=4,
                           teacher_resume=str(directory / "best_model.tar"))
                for name, directory in (("normal", normal), ("nasty", nasty))]
    done = [call("train_scratch", normal), call("train_nasty", nasty), *(call("train_kd", s) for s in students)]
    assert [run.returncode for run in done] == [0, 0, 0, 0], "".join(run.stderr for run in done)
    return normal, nasty, *students, done


def test_normal_teacher_nasty_teacher_and_students(chain):
    normal, nasty, of_normal, of_nasty, done = chain
    accuracy = results(normal)["best"]["test_accuracy"]
    assert f"adversarial network, frozen: test accuracy {accuracy:.2f} %" in done[1].stdout
    assert f"the network itself, before training: test accuracy {accuracy:.2f} %" in done[1].stdout
    assert f"teacher network, frozen: test accuracy {accuracy:.2f} %" in done[2].stdout
    nasty_accuracy = results(nasty)["best"]["test_accuracy"]
    assert f"teacher network, frozen: test accuracy {nasty_accuracy:.2f} %" in done[3].stdout
    for directory in (nasty, of_normal, of_nasty):
        row = results(directory)["last"]
        assert {"loss", "kl", "cross_entropy", "learning_rate", "test_loss", "test_accuracy"} <= set(row)
    row = results(nasty)["last"]
    assert row["loss"] == pytest.approx(row["cross_entropy"] - 1.0 * row["kl"], rel=1e-4)
    row = results(of_normal)["last"]
    assert row["loss"] == pytest.approx(0.9 * row["kl"] + 0.1 * row["cross_entropy"], rel=1e-4)


def test_the_nasty_teacher_diverges_from_its_initial_adversary(chain):
    _, nasty, *_ = chain
    with open(nasty / "metrics.csv") as file:
        kl = [float(row["kl"]) for row in csv.DictReader(file)]
    assert kl == sorted(kl)
    assert kl[-1] > 5 * kl[0]


def test_results_record_checkpoints_and_environment(chain):
    normal, nasty, of_normal, _, _ = chain
    content = results(of_normal)
    sha256 = hashlib.sha256((normal / "best_model.tar").read_bytes()).hexdigest()
    assert content["checkpoints_read"] == {"teacher": {"path": str(normal / "best_model.tar"), "sha256": sha256}}
    assert set(results(nasty)["checkpoints_read"]) == {"adversarial", "init_from"}
    assert content["stage"] == "train_kd.py"
    assert content["params"]["alpha"] == 0.9
    assert content["versions"]["torch"] == torch.__version__
    assert content["seed"] == 0
    assert content["wall_time_seconds"] > 0
    assert content["best"]["epoch"] <= content["last"]["epoch"] == 4


def test_metrics_and_log_have_a_line_per_epoch(chain):
    _, _, of_normal, *_ = chain
    with open(of_normal / "metrics.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [1, 2, 3, 4]
    log = (of_normal / "training.log").read_text()
    assert len(re.findall(r"epoch \d/4  lr 0.01  loss .* test accuracy .* % .* images/s", log)) == 4
    assert '"alpha": 0.9' in log
    assert "device: " in log


def test_tensorboard_has_the_curves_and_the_augmented_images(chain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, _, of_normal, *_ = chain
    events = EventAccumulator(str(of_normal))
    events.Reload()
    assert {"loss/loss", "loss/kl", "loss/cross_entropy", "loss/test", "accuracy/test", "learning_rate",
            "images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("accuracy/test")] == [1, 2, 3, 4]
    assert events.Tags()["images"] == ["augmented"]


def test_teacher_resume_on_the_command_line_replaces_the_one_in_params_json(call, chain):
    _, nasty, of_normal, *_ = chain
    path = str(nasty / "best_model.tar")
    assert call("train_kd", of_normal, "--restart", "--teacher_resume", path).returncode == 0
    assert results(of_normal)["checkpoints_read"]["teacher"]["path"] == path
    assert results(of_normal)["set"] == {"teacher_resume": path}


def test_overrides_are_logged_and_stored_in_the_results(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory, "--set", "seed=3", "batch_size=16").returncode == 0
    assert results(directory)["set"] == {"seed": 3, "batch_size": 16}
    assert results(directory)["params"]["batch_size"] == 16
    assert '"batch_size": 16' in (directory / "training.log").read_text()


def test_the_published_experiments_are_in_the_repository_as_published():
    assert len(GOLDEN) == 60
    assert {name: EXPERIMENTS.get(name) for name in GOLDEN} == GOLDEN
    assert all(list(EXPERIMENTS[name]) == list(GOLDEN[name]) for name in GOLDEN)


def in_order_of_need():
    """Sort key: teachers, nasty teachers, students."""
    return dict(sorted(EXPERIMENTS.items(), key=lambda item: [
        key in item[1] for key in ("teacher_model", "adversarial_model", "surrogate_resume")]))


def test_every_experiment_names_checkpoints_of_experiments_with_the_same_network():
    experiments = in_order_of_need()
    for name, values in experiments.items():
        roles = {key.removesuffix("_resume") for key in values if key.endswith("_resume")}
        for role in roles:
            path = values[f"{role}_resume"]
            source = experiments[str(Path(path).parent.relative_to("experiments"))]
            assert source["model_name"] == values.get(f"{role}_model", values["model_name"]), name
            assert source.get("num_channels", 32) == values.get(f"{role}_num_channels", 32), name
            assert source["dataset"] == values["dataset"], name
        if "init_from" in values:
            assert values["init_from"] == values.get("adversarial_resume", values["init_from"])
            start = experiments[str(Path(values["init_from"]).parent.relative_to("experiments"))]
            assert all(start[key] == values[key] for key in ("model_name", "dataset", "num_channels") if key in values)


def script_of(values):
    """Stage of an experiment, and the options for a fast run."""
    if "method" in values:
        rounds = ["epoch_steps=1", "student_steps=1", "synthesis_steps=1", "synthesis_batch_size=4"]
        quick = {"zskt": ["pseudo_batches=1", "student_steps=1"], "ood": ["patches=4"]}.get(values["method"], rounds)
        return "train_datafree", [*quick, "batch_size=4", "sr_rounds=1"]
    if "teacher_model" in values:
        smaller = {"query_budget": "query_budget=2", "pairs": "pairs=1000", "recovery_epochs": "recovery_epochs=1"}
        return "train_kd", ["subset_fraction=1", *(text for key, text in smaller.items() if key in values)]
    if "trigger" in values:
        return "train_poisoned", ["poison_rate=0.5", "clean_fraction=0"]
    return "train_nasty" if {"adversarial_model", "defense"} & values.keys() else "train_scratch", [
        "subset_fraction=1"] * ("subset_fraction" in values)


def abd_experiments(experiments, dataset):
    """Experiments by purpose, for each trigger and network."""
    groups = {}
    for name, values in experiments.items():
        *place, role = name.split("/")
        if "abd" in place and "trigger" in values and values["dataset"] == dataset:
            groups.setdefault("/".join(place), {})[role] = values
    return groups


@pytest.mark.parametrize("name", ["CIFAR10", "GTSRB"])
def test_backdoor_experiments_only_differ_in_trigger_and_teacher(name):
    groups = {place: group for place, group in abd_experiments(in_order_of_need(), name.lower()).items()
              if place.startswith(f"{name}/")}  # at full length
    triggers = {values["teacher"]["trigger"] for values in groups.values()}
    assert len(triggers) == 11 and triggers <= set(TRIGGER_NAMES) - {"sig_true"}
    first = groups[f"{name}/abd/badnet_grid"]
    for place, group in groups.items():
        assert group.keys() <= first.keys()
        for role, values in group.items():
            expected = {**first[role], "trigger": values["trigger"]}
            if role == "teacher":
                expected["model_name"] = values["model_name"]
            else:
                expected |= {"teacher_model": group["teacher"]["model_name"],
                             "teacher_resume": f"experiments/{place}/teacher/last_model.tar"}
            assert {key: value for key, value in values.items() if not key.startswith("surrogate")} == expected


def test_students_of_normal_and_nasty_teachers_only_differ_in_the_teacher():
    pairs = [(EXPERIMENTS[other], values) for name, values in EXPERIMENTS.items()
             if "/kd_normal_" in name and (other := name.replace("/kd_normal_", "/kd_nasty_")) in EXPERIMENTS]
    assert len(pairs) > 30
    for nasty, normal in pairs:
        assert nasty | {"teacher_resume": normal["teacher_resume"]} == normal
        assert "/nasty_" in nasty["teacher_resume"] and "/baseline/" in normal["teacher_resume"]


def is_one_of_a_kind(name):
    """True if an experiment represents its kind: students of nasty teachers; backdoor experiments with one or two
    triggers per data set; theft without data on CIFAR-10; ablations and attacks of the demo; one attack per defense."""
    dataset, kind, trigger, *_ = name.split("/")
    if dataset in COMMITTED:
        return False
    if "/kd_normal_" in name and name.replace("/kd_normal_", "/kd_nasty_") in EXPERIMENTS:
        return False
    if kind == "defenses":
        return name.endswith(("/teacher", "/no_labels/bayes"))
    if kind in ("ablations", "attacks"):
        return dataset == "demo"
    if "resnet34" in name:
        return dataset == "CIFAR10"
    chosen = {"CIFAR10": ("clean", "badnet_grid", "cl"), "GTSRB": ("clean", "smooth")}
    return kind != "abd" or dataset not in chosen or trigger in chosen[dataset]


def shown_by(values):
    """Yield what a step of an experiment covers: stage, methods, kinds of checkpoints and trained network on the data
    set, and frozen networks on any data set."""
    dataset, networks = values["dataset"], ("dataset", "trigger", "model_name", "teacher_model", "adversarial_model")
    words = {key: value for key, value in values.items() if isinstance(value, str) and key not in networks}
    methods = {key: "" if key in CHECKPOINTS else value for key, value in words.items()}
    yield dataset, script_of(values)[0], "trigger" in values, *sorted(methods.items())
    yield dataset, values["model_name"], values.get("num_channels", 32)
    for role in ("teacher", "adversarial"):
        if model := values.get(f"{role}_model"):
            yield model, values.get(f"{role}_num_channels", 32)


def sources_of(name):
    """An experiment and all experiments whose checkpoints it needs, directly or not."""
    paths = [EXPERIMENTS[name][key] for key in CHECKPOINTS if key in EXPERIMENTS[name]]
    return {name}.union(*(sources_of(str(Path(path).parent.relative_to("experiments"))) for path in paths))


def take_a_step():
    """Experiments that cover something new, with their dependencies, in dependency order."""
    needed, shown = set(), set()
    for name, values in in_order_of_need().items():
        if is_one_of_a_kind(name) and (new := set(shown_by(values)) - shown):
            needed |= sources_of(name)
            shown |= new
    return {name: values for name, values in in_order_of_need().items() if name in needed}


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted({name.partition("/")[0] for name in EXPERIMENTS} - set(COMMITTED)))
def test_one_experiment_of_each_kind_takes_a_step(call, tmp_path, monkeypatch, part):
    """Run one experiment of each kind by the real stages, with real checkpoints, on two synthetic images per split.

    Left out: experiments with committed results, and those that only differ in numbers or in the pairing of networks
    from one that takes a step.
    """
    def synthetic(name, data_dir, *_, **__):
        size = 64 if name == "tiny_imagenet" else 32
        pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=seeds.generator("test"))
        labels = torch.tensor([int(name == "gtsrb"), CLASSES[name] - 1])  # the target, and another
        return Dataset(name, pixels, labels, pixels, labels, tuple(map(str, range(CLASSES[name]))), (0.5,) * 3,
                       (0.25,) * 3, {"tiny_imagenet": "rotate_flip", "gtsrb": "crop"}.get(name, "crop_flip"))
    monkeypatch.setattr(run_module, "load_dataset", synthetic)
    monkeypatch.chdir(tmp_path)
    experiments = {name: values for name, values in take_a_step().items() if name.startswith(f"{part}/")}
    assert experiments
    for name, values in experiments.items():
        directory = tmp_path / "experiments" / name
        directory.mkdir(parents=True)
        (directory / "params.json").write_text(json.dumps(values))
        script, quick = script_of(values)
        done = call(script, directory.relative_to(tmp_path), "--set", "num_epochs=1", "precision=fp32", *quick)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert results(directory)["last"]["epoch"] == 1
        if not any(f"experiments/{name}/" in str(other.get(key)) for other in experiments.values()
                   for key in CHECKPOINTS):  # no other run needs it; frees disk space
            for path in directory.glob("*.tar"):
                path.unlink()
    for path in tmp_path.rglob("*.tar"):
        path.unlink()


def test_a_student_does_not_start_from_the_weights_from_which_its_teacher_started(call, experiment, monkeypatch):
    started = []
    network = run_module.Run.network
    monkeypatch.setattr(run_module.Run, "network", lambda self: started.append(network(self)) or started[-1])
    teacher = experiment("teacher", num_epochs=1, learning_rate=1e-30)
    assert call("train_scratch", teacher).returncode == 0
    student = experiment("student", num_epochs=1, learning_rate=1e-30, temperature=4, alpha=0.9, teacher_model="net",
                         teacher_num_channels=4, teacher_resume=str(teacher / "last_model.tar"))
    assert call("train_kd", student).returncode == 0
    first, second = (next(started[i].parameters()) for i in (0, 1))
    assert first.shape == second.shape
    assert not torch.allclose(first, second)
