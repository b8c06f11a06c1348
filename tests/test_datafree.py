"""Students without data: files of a run, no access to images of the data set, and resuming."""
import dataclasses
import json
import math

import pytest
import torch
from conftest import refused, results
from PIL import Image
from torch import nn

from datafree import REGISTRY as METHODS
from datafree.cmi import CMI
from datafree.distiller import DataSpec
from datafree.losses import attention_loss, kl_element_mean
from datafree.ood import OoD
from datafree.retrospection import Retrospection
from datafree.zskt import ZSKT, with_outputs
from model import build_model
from runs.stages import PoisonedParams
from utils import run as run_module
from utils.augment import normalize
from utils.data import training_index
from utils.datasets import load_dataset
from utils.errors import UserError

ZSKT_FEW = {"method": "zskt", "model_name": "wrn16_1", "teacher_model": "wrn16_1", "pseudo_batches": 3,
            "student_steps": 2, "latent_size": 8}
OOD_FEW = {"method": "ood", "model_name": "net", "teacher_model": "net", "teacher_num_channels": 4, "patches": 24,
           "sv_layers": 2}
ROUNDS = {"model_name": "net", "teacher_model": "net", "teacher_num_channels": 4, "epoch_steps": 4, "student_steps": 2,
          "synthesis_steps": 2, "synthesis_batch_size": 8, "sv_layers": 2}
FEW = {"zskt": ZSKT_FEW, "ood": OOD_FEW, "dafl": {**ROUNDS, "method": "dafl", "latent_size": 8},
       "dfq": {**ROUNDS, "method": "dfq", "latent_size": 8}, "deepinversion": {**ROUNDS, "method": "deepinversion"},
       "cmi": {**ROUNDS, "method": "cmi", "latent_size": 8, "bank_size": 32, "negatives": 8}}  # full after two epochs


@pytest.fixture
def distil(call, experiment):
    """`distil("zskt", "name", **params)` creates a poisoned teacher, once, and the directory of a student."""
    def make(kind, name="student", **params):
        model = FEW[kind]["teacher_model"]
        teacher = experiment(f"teacher-{model}", model_name=model, num_epochs=1, trigger="badnet_sq", poison_rate=0.5)
        if not (teacher / "last_model.tar").exists():
            assert call("train_poisoned", teacher).returncode == 0
        return experiment(name, **{**FEW[kind], "teacher_resume": str(teacher / "last_model.tar"), "target": 1,
                                   "trigger": "badnet_sq", **params})
    return make


def networks():
    """Random student and random teacher, equal at each call."""
    torch.manual_seed(0)
    return build_model("wrn16_1", 4), build_model("wrn16_1", 4).eval().requires_grad_(False)


def zskt(student=None, teacher=None, **params):
    """Learner with a random teacher, and its latent vectors. Missing networks come from `networks`."""
    drawn = networks()
    student, teacher = student or drawn[0], teacher or drawn[1]
    params = ZSKT.Params(**ZSKT_FEW, **{"dataset": "demo", "teacher_resume": "x", "batch_size": 8, **params})
    spec = DataSpec(4, 32, torch.zeros(3), torch.ones(3), "crop_flip")
    learner = ZSKT(student.train(), teacher, spec, params, torch.float32)
    return learner, torch.randn(8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", FEW)
def test_a_student_without_data_is_trained_and_measured(call, distil, method):
    directory = distil(method)
    done = call("train_datafree", directory)
    assert done.returncode == 0, done.stderr
    row = results(directory)["last"]
    assert {"test_accuracy", "asr", "base_rate", "target_recall", "triggered_accuracy", "loss"} <= row.keys()
    reestimated = results(directory)["details"]["reestimated_batch_norm"]
    assert {"test_accuracy", "test_loss", "asr", "base_rate", "target_recall", "triggered_accuracy"} == \
        reestimated.keys()
    assert reestimated["test_loss"] != row["test_loss"]
    assert "teacher network, frozen: test accuracy" in done.stdout
    assert {"synthetic.png", "best_model.tar", "last_model.tar", "metrics.csv"} <= {p.name for p in directory.iterdir()}


def stop_in_second(epoch):
    """Epoch of a learner that is interrupted if it is the second of a run."""
    def interrupted(self, number, title):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number, title)
    return interrupted


@pytest.mark.slow
@pytest.mark.parametrize("method, params", [
    ("zskt", {}), ("zskt", {"backdoor_defense": "auto", "sv_batches": 2, "sr_epochs": 1, "sr_rounds": 2}),
    ("ood", {"backdoor_defense": "sv+sr", "sr_epochs": 1, "sr_rounds": 2}),
    ("ood", {"backdoor_defense": "sr", "sr_epochs": 3, "sr_rounds": 1, "optimizer": "sgd"}),
    ("cmi", {}), ("cmi", {"backdoor_defense": "auto", "sv_batches": 3, "sr_epochs": 1, "sr_rounds": 1}), ("dafl", {}),
    ("dfq", {"backdoor_defense": "sv"}), ("deepinversion", {"backdoor_defense": "sr", "sr_epochs": 1, "sr_rounds": 1})])
def test_a_continued_run_equals_an_uninterrupted_one(call, distil, method, params):
    whole, parts = distil(method, "whole", num_epochs=3, **params), distil(method, "parts", num_epochs=3, **params)
    assert call("train_datafree", whole).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS[method], "epoch", stop_in_second(METHODS[method].epoch))
        assert call("train_datafree", parts).returncode == 130
    assert call("train_datafree", parts).returncode == 0
    a, b = (torch.load(d / "last_model.tar", weights_only=True) for d in (whole, parts))
    assert a["history"] == b["history"]
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])


class Guarded(torch.Tensor):
    """Tensor that raises on any operation while `armed`."""

    armed = False

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        assert not cls.armed, f"{function} on an image of the data set"
        return super().__torch_function__(function, types, arguments, options or {})


@pytest.mark.parametrize("method", FEW)
def test_a_method_sees_no_image_of_the_data_set(call, distil, monkeypatch, method):
    directory = distil(method, backdoor_defense="sv+sr", sr_epochs=1, sr_rounds=2)
    load, touched = run_module.load_dataset, []

    def guarded(*arguments, **options):
        assert options["training"] is False
        dataset = load(*arguments, **options)
        return dataclasses.replace(dataset, **{name: getattr(dataset, name).as_subclass(Guarded) for name in (
            "train_images", "train_labels", "test_images", "test_labels")})

    def armed(function):
        def call(*arguments, **options):
            Guarded.armed = True
            try:
                with pytest.raises(AssertionError, match="an image of the data set"):
                    touched[0][:1].sum()
                return function(*arguments, **options)
            finally:
                Guarded.armed = False
        return call

    split = run_module.split
    monkeypatch.setattr(run_module, "load_dataset", guarded)
    monkeypatch.setattr(run_module, "split", lambda *a: (parts := split(*a), touched.append(
        parts["test"].images))[0])
    for name in ("__init__", "setup", "epoch", "epoch_images"):
        monkeypatch.setattr(METHODS[method], name, armed(getattr(METHODS[method], name)))
    done = call("train_datafree", directory)
    assert done.returncode == 0, done.stderr
    assert type(touched[0]) is Guarded


def test_stored_teacher_answers_give_the_same_gradients():
    student, teacher = networks()
    learner, latent = zskt(student, teacher)
    images, logits, groups = learner.query_teacher(latent)
    terms = learner.student_step(images, logits, groups, None)
    kept = [parameter.grad.clone() for parameter in student.parameters()]

    other, other_teacher = networks()
    same, _ = zskt(other, other_teacher)
    images = same._generator(latent)  # with its graph, as published
    groups = ("group1", "group2", "group3")
    teacher_logits, teacher_groups = with_outputs(other_teacher, groups, images)
    student_logits, student_groups = with_outputs(other, groups, images)
    loss = kl_element_mean(teacher_logits.detach(), student_logits, temperature=1) + 250 * attention_loss(
        student_groups, [group.detach() for group in teacher_groups])
    loss.backward()
    nn.utils.clip_grad_norm_(other.parameters(), 5.0)
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for parameter, gradient in zip(other.parameters(), kept, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in [*learner._generator.parameters(), *teacher.parameters()])


@pytest.mark.parametrize("student, teacher, count", [("net", "wrn16_1", 3), ("wrn16_1", "mobilenetv2", 3),
                                                     ("shufflenetv2", "resnet18", 4)])
def test_attention_is_transferred_between_all_networks_with_stages(student, teacher, count):
    params = ZSKT.Params(**ZSKT_FEW | {"dataset": "demo", "teacher_resume": "x", "batch_size": 2, "model_name": student,
                                      "teacher_model": teacher})
    learner = ZSKT(build_model(student, 4).train(), build_model(teacher, 4).eval().requires_grad_(False),
                   DataSpec(4, 32, torch.zeros(3), torch.ones(3), "crop_flip"), params, torch.float32)
    images, logits, stages = learner.query_teacher(torch.randn(2, 8))
    assert len(stages) == count
    terms = learner.student_step(images, logits, stages, None)
    assert terms["attention"] > 0
    assert terms["loss"].item() == pytest.approx((terms["kl"] + 250 * terms["attention"]).item())


@pytest.mark.slow
def test_the_generator_learns_to_make_images_on_which_student_and_teacher_differ():
    student, teacher = networks()
    learner, latent = zskt(student, teacher, generator_learning_rate=0.01)
    losses = [learner.generator_step(latent)["generator_loss"].item() for _ in range(20)]
    assert losses[-1] < losses[0] < 0
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_vaccine_rewards_the_generator_and_is_logged():
    student, teacher = networks()
    teacher.fc.bias.data[1] = 3  # agreement on all samples, so that the vaccine has a gradient
    learner, latent = zskt(student, teacher, backdoor_defense="sv")
    same, _ = zskt(student, teacher, backdoor_defense="none")
    terms, plain = learner.generator_step(latent), same.generator_step(latent)
    assert plain.keys() == {"generator_loss"}
    assert terms["generator_loss"].item() == pytest.approx(plain["generator_loss"].item())
    assert terms["generator_loss"] < 0
    assert terms["vaccine"] < 0
    gradients = [parameter.grad for parameter in learner._generator.parameters()]
    assert not all(map(torch.allclose, gradients, [parameter.grad for parameter in same._generator.parameters()]))


@pytest.mark.slow
def test_retrospection_runs_in_the_last_epochs_with_its_own_optimizer():
    learner, _ = zskt(backdoor_defense="sr", num_epochs=4, sr_epochs=2, sr_rounds=1, sr_learning_rate=1e-4)

    def steps():
        return learner.state_dict()["optim_dict"]["state"][0]["step"]

    assert "delta_norm" not in learner.epoch(0, "")
    assert "delta_norm" not in learner.epoch(1, "")
    assert steps() == 12
    row = learner.epoch(2, "")
    assert row["delta_norm"] > 0
    assert row["learning_rate"] == 1e-4
    assert steps() == 6


@pytest.mark.parametrize("change, words", [
    ({"method": "kegnet"}, ["method", "kegnet", "ood, zskt"]),
    ({"method": ["zskt"]}, ["method", "ood, zskt"]),
    ({"method": "zskt", "patches": 5}, ["patches", '"method" "ood"']),
    ({"model_name": "mlp"}, ["attention_weight", "mlp", "wrn16_1"]),
    ({"sv_layers": 99, "backdoor_defense": "sv"}, ["vaccine", "99"]),
    ({"trigger": "square"}, ["square", "badnet_sq"]),
    ({"target": 3}, ["target", "3 classes"]),
])
def test_wrong_parameters_of_a_data_free_run_are_one_line(call, distil, change, words):
    line = refused(call, "train_datafree", distil("zskt", **change))
    assert all(word in line for word in words), line


def test_the_old_name_of_the_backdoor_defense_is_named_with_the_new_one(call, distil):
    assert '"defense" is now called "backdoor_defense"' in refused(call, "train_datafree", distil("ood", defense="sv"))


def test_a_poisoned_run_records_what_it_poisoned(call, experiment):
    directory = experiment(trigger="sig", target=2, poison_rate=0.2, num_epochs=1)
    assert call("train_poisoned", directory).returncode == 0
    record = json.loads((directory / "poisoned.json").read_text())
    assert (record["trigger"], record["target"], len(record["images"])) == ("sig", 2, 9)
    assert {"asr", "base_rate"} <= results(directory)["last"].keys()


def test_poisoned_images_are_numbered_as_in_the_data_set(call, experiment):
    directory = experiment(trigger="badnet_sq", target=1, poison_rate=0.2, num_epochs=1, subset_fraction=0.5,
                           validation_fraction=0.2)
    assert call("train_poisoned", directory).returncode == 0
    params = json.loads((directory / "params.json").read_text())
    dataset = load_dataset(params["dataset"], directory)
    kinds = training_index(dataset, PoisonedParams(**params))
    images = json.loads((directory / "poisoned.json").read_text())["images"]
    assert len(images) == int(0.2 * len(kinds["train"]))
    assert set(images) <= set(kinds["train"].tolist())
    assert (dataset.train_labels[images] != 1).all()


def test_num_epochs_is_fixed_if_the_learning_rate_depends_on_it(call, experiment, distil):
    for script, directory in (("train_scratch", experiment("cosine", annealing="cosine")),
                              ("train_datafree", distil("ood"))):
        assert call(script, directory).returncode == 0
        assert "num_epochs (2 -> 3)" in refused(call, script, directory, "--set", "num_epochs=3")


def test_training_uses_the_poisoned_images(call, experiment, monkeypatch):
    seen = []
    train = run_module.Run.train
    monkeypatch.setattr(run_module.Run, "train", lambda self, *a, **options: seen.append(self.parts["train"]) or
                        train(self, *a, **options))
    clean, poisoned = experiment("clean", num_epochs=1), experiment("poisoned", trigger="badnet_sq", target=1,
                                                                    poison_rate=0.4, num_epochs=1)
    assert call("train_scratch", clean).returncode == call("train_poisoned", poisoned).returncode == 0
    index = torch.tensor(json.loads((poisoned / "poisoned.json").read_text())["images"])
    before, after = seen
    assert len(index) == 18
    assert (before.labels[index] != 1).all()
    assert (after.labels[index] == 1).all()
    assert (after.images[index, 27:31, 27:31] == 255).all()
    rest = torch.ones(45, dtype=torch.bool)
    rest[index] = False
    assert torch.equal(before.images[rest], after.images[rest])
    assert torch.equal(before.labels[rest], after.labels[rest])


@pytest.mark.slow
def test_a_poisoned_teacher_has_its_backdoor_and_is_otherwise_a_good_network(call, experiment):
    directory = experiment(dataset="demo", num_channels=16, trigger="badnet_sq", num_epochs=1, batch_size=64,
                           learning_rate=0.002)
    assert call("train_poisoned", directory).returncode == 0
    row = results(directory)["last"]
    assert row["asr"] > 95
    assert row["test_accuracy"] > 65
    assert row["base_rate"] < 10


@pytest.mark.parametrize("change", [{"trigger": "cl"}, {"trigger": "badnet_sq", "surrogate_resume": "clean.tar"}])
def test_a_surrogate_is_only_accepted_for_adversarial_images(call, experiment, change):
    clean = experiment("clean", num_epochs=1)
    assert call("train_scratch", clean).returncode == 0
    if "surrogate_resume" in change:
        change = {**change, "surrogate_resume": str(clean / "last_model.tar")}
    assert "surrogate_resume" in refused(call, "train_poisoned", experiment("poisoned", **change))


def test_retrospection_and_the_vaccine_act_on_patches(call, distil):
    directory = distil("ood", backdoor_defense="sv+sr", sr_epochs=1, sr_rounds=2)
    assert call("train_datafree", directory).returncode == 0
    first, last = torch.load(directory / "last_model.tar", weights_only=True)["history"]
    assert first["suspicious"] > 0
    assert "delta_norm" not in first
    assert last["delta_norm"] > 0
    assert (directory / "perturbation.png").exists()


def test_a_run_reports_the_diagnosis_of_its_vaccine_and_success_by_class(call, distil):
    directory = distil("ood", backdoor_defense="sv", num_epochs=1)
    assert call("train_datafree", directory).returncode == 0
    details = results(directory)["details"]
    rates = details["asr_by_class"]
    assert [rate is None for rate in rates] == [False, True, False]
    assert all(0 <= rate <= 100 for rate in rates if rate is not None)
    assert 0 <= details["vaccine"]["auc"] <= 1
    assert sum(details["vaccine"]["shuffled_classes"]) == pytest.approx(100)


def test_a_nasty_teacher_is_a_teacher_like_any_other(call, experiment):
    normal = experiment("normal", num_epochs=1)
    assert call("train_scratch", normal).returncode == 0
    nasty = experiment("nasty", num_epochs=1, adversarial_model="net", adversarial_num_channels=4, temperature=4,
                       adversarial_resume=str(normal / "last_model.tar"), weight=0.1, trigger="sig")
    assert call("train_nasty", nasty).returncode == 0
    assert "asr" in results(nasty)["last"]
    assert "asr" in results(nasty)["evaluated_before"]["adversarial network, frozen"]
    student = experiment("student", **FEW["dafl"], teacher_resume=str(nasty / "last_model.tar"), trigger="sig")
    assert call("train_datafree", student).returncode == 0
    assert "asr" in results(student)["last"]


def test_a_teacher_with_a_weak_backdoor_is_warned_about(call, distil):
    done = call("train_datafree", distil("ood", trigger="l0_inv", num_epochs=1))
    assert "the trigger fails on most images: the network lacks this backdoor" in done.stdout


@pytest.mark.parametrize("classes, accuracy, doubted", [(10, 18.9, True), (10, 19.1, False), (2, 54, True)])
def test_a_teacher_hardly_above_chance_is_warned_about(classes, accuracy, doubted):
    assert bool(run_module.warn_about_chance(classes)("teacher", {"test_accuracy": accuracy})) == doubted


def test_another_picture_under_a_run_is_refused(call, distil, tmp_path):
    picture = tmp_path / "picture.png"
    for shade in (90, 91):
        Image.new("RGB", (80, 80), (shade, 0, 0)).save(picture)
        directory = distil("ood", picture=str(picture), num_epochs=2)
        if shade == 90:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OoD, "epoch", stop_in_second(OoD.epoch))
                assert call("train_datafree", directory).returncode == 130
    line = refused(call, "train_datafree", directory)
    assert "picture.png differs from the picture that this run started with" in line


@pytest.mark.slow
def test_auto_uses_retrospection_if_no_vaccine_is_found_in_time(call, distil):
    directory = distil("zskt", backdoor_defense="auto", sv_batches=50, sr_epochs=1, sr_rounds=1)
    assert call("train_datafree", directory).returncode == 0
    row = results(directory)["last"]
    assert row["vaccine"] == 0
    assert row["delta_norm"] > 0


class Recorder(nn.Module):
    """Network that stores its input images."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, images):
        self.seen.append(images)
        return self.network(images)


def patches(**params):
    """Learner on patches with a random teacher that prefers a few classes, and its student."""
    torch.manual_seed(0)
    student, teacher = Recorder(build_model("net", 4, num_channels=4)), build_model("net", 4, num_channels=4)
    params = OoD.Params(**OOD_FEW | {"dataset": "demo", "teacher_resume": "x", "batch_size": 8, "num_channels": 4,
                                    "patches": 48, **params})
    spec = DataSpec(4, 32, torch.zeros(3), torch.ones(3), "crop_flip")
    return OoD(student, teacher.eval().requires_grad_(False), spec, params, torch.float32), student


def test_an_unfinished_vaccine_search_ends_when_retrospection_begins(call, distil):
    directory = distil("ood", backdoor_defense="auto", sv_batches=2, sv_tail=0.99, num_epochs=3, sr_epochs=2,
                       sr_rounds=1, batch_size=24)
    done = call("train_datafree", directory)
    assert done.returncode == 0
    assert "the unfinished search for a vaccine stops" in done.stdout
    used = results(directory)["details"]["vaccine"]
    assert used["used"] is False and len(used["tails"]) == 0
    history = torch.load(directory / "last_model.tar", weights_only=True)["history"]
    assert ["delta_norm" in row for row in history] == [False, True, True]


@pytest.mark.parametrize("change, words", [
    ({"epoch_steps": 5, "student_steps": 2}, ["epoch_steps", "multiple"]),
    ({"epoch_steps": 3, "student_steps": 5}, ["epoch_steps", "multiple"]),
    ({"one_hot_weight": 0, "activation_weight": 0, "balance_weight": 0}, ["one_hot_weight", "are 0"])])
def test_unsupported_options_of_a_method_in_rounds_are_one_line(call, distil, change, words):
    line = refused(call, "train_datafree", distil("dafl", **change))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("weight, words", [(1.0, "batch_norm_weight"), (0.0, "cmi")])
def test_methods_that_use_batch_norms_refuse_a_teacher_without(weight, words):
    params = CMI.Params(**FEW["cmi"] | {"dataset": "demo", "teacher_resume": "x", "teacher_model": "mlp",
                                       "batch_norm_weight": weight})
    with pytest.raises(UserError, match=f"{words}.*mlp"):
        METHODS["cmi"](build_model("mlp", 4), build_model("mlp", 4).eval(),
                       DataSpec(4, 32, torch.zeros(3), torch.ones(3), "crop_flip"), params, torch.float32)


def test_patches_are_mixed_in_pairs_unless_that_is_off():
    for switch in (0, 1):
        learner, student = patches(cutmix=switch)
        learner.epoch(0, "")
        cut = [batch.images for batch in learner.batches.epoch(0)]
        assert [len(images) for images in student.seen] == [len(images) for images in cut]
        assert all(map(torch.equal, student.seen, cut)) == (not switch)


class Brightness(nn.Module):
    """Predicts 1 for bright images, which are rare among patches of a picture, otherwise 0."""

    def forward(self, images):
        return nn.functional.one_hot((images.mean((1, 2, 3)) > 0.55).long(), 2).float()


def test_balanced_patches_show_the_teachers_rare_classes_more_often():
    rare = {}
    for switch in (0, 1):
        params = OoD.Params(**OOD_FEW | {"dataset": "demo", "teacher_resume": "x", "patches": 300, "balance": switch})
        spec = DataSpec(2, 32, torch.zeros(3), torch.ones(3), "crop_flip")
        teacher = Brightness()
        learner = OoD(build_model("net", 2), teacher, spec, params, torch.float32)
        part = learner.batches.part
        rare[switch] = teacher(normalize(part.images, part.mean, part.std)).argmax(1).sum().item()
    assert 0 < rare[0] < 100
    assert rare[1] == min(6 * rare[0], 150)


def test_the_rates_fall_within_an_epoch():
    learner, _ = zskt(num_epochs=2, learning_rate=0.1, generator_learning_rate=0.2)
    learner.epoch(0, "")
    done = (0 + 2 / 3) / 2  # two of three pseudo-batches of an epoch were over when the last one began
    for name, initial in (("optim_dict", 0.1), ("generator_optim_dict", 0.2)):
        rate = learner.state_dict()[name]["param_groups"][0]["lr"]
        assert rate == pytest.approx(initial * (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["teacher", "student"])
def test_the_perturbation_targets_the_named_network(monkeypatch, source):
    asked = []
    original = Retrospection.accumulate
    monkeypatch.setattr(Retrospection, "accumulate", lambda self, student, network, *rest: asked.append(network) or
                        original(self, student, network, *rest))
    student, teacher = networks()
    learner, _ = zskt(student, teacher, backdoor_defense="sr", sr_source=source, sr_epochs=1, num_epochs=1, sr_rounds=1)
    learner.epoch(0, "")
    assert len(asked) == 6
    assert all(network is {"student": student, "teacher": teacher}[source] for network in asked)
