"""Every registered attack, defense, answer defense, interface, network, data set, trigger and data-free method keeps
its contract."""
from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
import datafree
import defenses
from attacks import build_attack
from attacks.base import Attack
from backdoor.triggers import TRIGGER_NAMES, build_trigger
from datafree.distiller import DataSpec
from defenses.answers import ANSWER_DEFENSES, INTERFACES, Answers, build_answer_defense, build_interface
from model import MODEL_NAMES, build_model
from utils import datasets
from utils.data import Batch, Images, TrainBatches
from utils.datasets import DATASETS, load_dataset
from utils.errors import UserError
from utils.evaluation import Evaluation, Frozen
from utils.registry import Entry
from utils.supervised import Supervised

CLASSES, SIZE, COUNT = 4, 8, 12


class Small(nn.Module):
    """Network with batch norm and a fixed scale of its logits."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier, self.scale = nn.Linear(4, CLASSES), scale

    def forward(self, images):
        return self.classifier(self.features(images)) * self.scale


class NoHostSync(TorchDispatchMode):
    """Fails on operations that wait for the GPU, which a CUDA graph cannot record.

    For example, a boolean index waits for its number of elements; `masked_fill` and `where` do not wait.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert name not in self.FORBIDDEN, name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]), \
                f"{name} with a mask"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") in (None, args[0].device), "a copy to another device"
        if name == "copy_":
            assert args[0].device == args[1].device, "a copy to another device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    return Batch(torch.randn(COUNT, 3, SIZE, SIZE, generator=random), torch.arange(COUNT) % CLASSES,
                 torch.arange(COUNT), torch.tensor(3.0))


@pytest.fixture
def answers():
    return 3 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1))


def loss_of(kind, name, answers, scale=1.0):
    """A function (network, batch) -> terms, and the module with the method's own parameters."""
    torch.manual_seed(2)
    if kind == "attack":
        attack = build_attack(name, CLASSES).to(answers.device)
        return (lambda network, batch: attack(network, batch, answers[batch.index])), attack
    method = defenses.REGISTRY[name]
    required = {key: "x" for key, field in method.Params.model_fields.items() if field.is_required()}
    frozen = {role: Frozen(Small(scale).to(answers.device)) for role in method.frozen_roles}
    defense = method(method.Params(**required), CLASSES, **frozen).to(answers.device)
    return defense, defense


def check_no_host_sync(build, batch, answers):
    """Fail if a step of the loss `build(answers)` reads a value: on the CPU, by inspecting operations, and on the meta
    device, whose tensors have no values, so that `.tolist()`, for example, raises."""
    for device in ("cpu", "meta"):
        loss, network = build(answers.to(device)), Small().to(device)
        moved = Batch(*(tensor.to(device) for tensor in batch))
        loss(network, moved)  # the first call creates the parameters that depend on the network
        with NoHostSync():
            loss(network, moved)["loss"].backward()


METHODS = [("attack", name) for name in attacks.REGISTRY] + [("defense", name) for name in defenses.REGISTRY]


@pytest.mark.parametrize(("kind", "name"), METHODS)
class TestEveryMethod:
    def test_returns_a_loss_and_its_terms_as_finite_scalars(self, kind, name, batch, answers):
        loss, _ = loss_of(kind, name, answers)
        terms = loss(Small(), batch)
        assert "loss" in terms and terms["loss"].requires_grad
        assert all(value.shape == () and value.isfinite() for value in terms.values())

    @pytest.mark.parametrize("case", ["bfloat16", "extreme logits", "zeros"])
    def test_has_finite_gradients(self, kind, name, case, batch, answers):
        scale = 1e4 if case == "extreme logits" else 1.0
        if case == "zeros":  # an interface that reveals two classes
            if kind == "defense":
                pytest.skip("a defense reads no answers")
            answers = answers.masked_fill(answers < answers.topk(2, dim=1).values[:, -1:], -torch.inf)
        loss, _ = loss_of(kind, name, scale * answers, scale)
        network = Small(scale)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
            terms = loss(network, batch)
        terms["loss"].backward()
        assert all(value.isfinite() for value in terms.values())
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())

    def test_does_not_modify_batch_or_answers(self, kind, name, batch, answers):
        before = [tensor.clone() for tensor in (*batch, answers)]
        loss, _ = loss_of(kind, name, answers)
        loss(Small(), batch)["loss"].backward()
        assert all(torch.equal(now, then) for now, then in zip((*batch, answers), before, strict=True))

    def test_does_not_wait_for_the_device(self, kind, name, batch, answers):
        check_no_host_sync(lambda answers: loss_of(kind, name, answers)[0], batch, answers)

    def test_trains_and_continues_bit_for_bit(self, kind, name, answers):
        def epoch(made, number):
            torch.manual_seed(number)  # as a run does
            return made.epoch(number, "")

        def learner():
            torch.manual_seed(3)
            network = Small()
            loss, method = loss_of(kind, name, answers)
            params = SimpleNamespace(learning_rate=0.1, annealing="steps", schedule=[], gamma=1, optimizer="sgd",
                                     compile="auto", cuda_graph="auto", num_epochs=3)
            made = Supervised(network, loss, batches, params, torch.float32, method)
            made.setup(print)
            return made

        pixels = torch.randint(256, (COUNT, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(4)).byte()
        part = Images(pixels, torch.arange(COUNT) % CLASSES, torch.zeros(3), torch.ones(3))
        batches = TrainBatches(part, 4, "crop", seed=0)
        first = learner()
        epoch(first, 0)
        saved = copy.deepcopy((first.network.state_dict(), first.state_dict()))
        row = epoch(first, 1)
        second = learner()
        second.network.load_state_dict(saved[0])
        second.load_state_dict({**saved[1], "epoch": 1})
        assert epoch(second, 1) == row


class Peeking(Attack):
    """Attack that applies a function to its logits."""

    peek = None

    def forward(self, student, batch, answers):
        logits = student(batch.images)
        return {"loss": (logits - answers).square().mean() + self.peek(logits)}


def assigned(logits, value):
    logits = logits.clone()
    logits[logits > 0] = value
    return logits.sum()


@pytest.mark.parametrize("peek", [
    lambda x: x[x > 0].sum(), lambda x: assigned(x, 0.0), lambda x: assigned(x, x[0, 0].detach()),
    lambda x: x.mean().item(), lambda x: float(x.detach().mean()), lambda x: 1 if x.mean() > 0 else 2,
    lambda x: x.detach().cpu().sum(), lambda x: x.to("cpu").sum(), lambda x: sum(x[0].tolist()),
    lambda x: float(x.detach().numpy().sum()), lambda x: x.argmax(1).unique().sum(), lambda x: x.nonzero().sum(),
    lambda x: (x * torch.ones(CLASSES)).sum()])
def test_an_attack_that_waits_for_the_device_is_found(peek, batch, answers):
    attack = Peeking(Peeking.Params(), CLASSES)
    attack.peek = peek
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError, TypeError),
                       match=r"_local_scalar_dense|mask|device|meta|unique|nonzero"):
        check_no_host_sync(lambda answers: lambda network, batch: attack(network, batch, answers), batch, answers)


@pytest.mark.parametrize("peek", [
    lambda x: x.masked_fill(x > 0, 0).sum(), lambda x: torch.where(x > 0, x, 0).sum(),
    lambda x: x[:, 1:].double().sum(), lambda x: x[x.argmax(0)].sum(),
    lambda x: (x * torch.ones(CLASSES, device=x.device)).sum()])
def test_an_attack_that_does_not_wait_passes(peek, batch, answers):
    attack = Peeking(Peeking.Params(), CLASSES)
    attack.peek = peek
    check_no_host_sync(lambda answers: lambda network, batch: attack(network, batch, answers), batch, answers)


def specifications(registry):
    """Names without strength, and names with a valid strength."""
    for name in registry:
        for strength in ("", ":1", ":2", ":0.5"):
            try:
                registry.entry(name).value(strength[1:])
            except ValueError:
                continue
            yield name + strength


@pytest.mark.parametrize(("build", "specification"), [
    *((build_answer_defense, text) for text in specifications(ANSWER_DEFENSES)),
    *((build_interface, text) for text in specifications(INTERFACES))])
def test_every_answer_defense_and_interface_gives_probabilities(build, specification):
    probabilities = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).mul(5).softmax(1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0, 0])
    before, transform = probabilities.clone(), build(specification)
    made = transform(probabilities)
    assert made.shape == before.shape and (made >= 0).all()
    torch.testing.assert_close(made.sum(1), torch.ones(6))
    assert torch.equal(probabilities, before)
    assert torch.equal(transform(probabilities), made)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_network_maps_images_to_logits_and_does_not_wait_for_the_device(name):
    with torch.device("meta"):
        network, images = build_model(name, 7), torch.empty(2, 3, 32, 32)
    with NoHostSync():
        logits = network(images)
        logits.sum().backward()
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_square_uint8_images_and_labels_of_its_classes(name, monkeypatch):
    """Skipped if the files are not in `data`; nothing is downloaded."""
    def refuse(name, source, root, files, *options):
        if missing := [path for path in files if not path.exists()]:
            pytest.skip(f"there is no {missing[0]}")

    monkeypatch.setattr(datasets, "_download_if_missing", refuse)
    try:
        dataset = load_dataset(name, ROOT / "data")
    except UserError as error:
        pytest.skip(str(error))
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert images.shape == (len(labels), dataset.image_size, dataset.image_size, 3)
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < dataset.num_classes
    assert dataset.name == name and all(0 < value < 1 for value in (*dataset.mean, *dataset.std))
    assert len(load_dataset(name, ROOT / "data", training=False).train_images) == 0


@pytest.mark.parametrize("name", TRIGGER_NAMES)
def test_every_trigger_is_pure_and_treats_images_one_by_one(name):
    images = torch.randint(256, (4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before, stamp = images.clone(), build_trigger(name).stamp
    result = stamp(images)
    assert torch.equal(images, before) and result.data_ptr() != images.data_ptr()
    assert result.dtype == torch.uint8 and result.shape == images.shape
    assert not torch.equal(result, images)
    assert torch.equal(result, torch.cat([stamp(image[None]) for image in images]))
    assert torch.equal(result, stamp(images.transpose(1, 2).contiguous().transpose(1, 2)))
    assert stamp(images[:0]).shape == (0, 32, 32, 3)


# Parameters that set the length of an epoch of a data-free method, for those that have them.
SHORT = {"epoch_steps": 4, "student_steps": 2, "synthesis_steps": 2, "synthesis_batch_size": 4, "pseudo_batches": 2,
         "patches": 8, "bank_size": 8, "negatives": 4, "latent_size": 4, "batch_size": 4}


@pytest.mark.parametrize("name", datafree.REGISTRY)
class TestEveryDataFreeMethod:
    def build(self, name):
        method = datafree.REGISTRY[name]
        short = {key: value for key, value in SHORT.items() if key in method.Params.model_fields}
        params = method.Params(method=name, dataset="demo", model_name="net", teacher_model="net", teacher_resume="x",
                               num_epochs=3, **short)
        torch.manual_seed(0)
        student, teacher = (build_model("net", CLASSES, num_channels=4) for _ in range(2))
        spec = DataSpec(CLASSES, 32, torch.zeros(3), torch.ones(3), "crop_flip")
        learner = method(student, teacher.eval().requires_grad_(False), spec, params, torch.float32)
        learner.setup(print)
        return student, teacher, learner

    def test_trains_the_student_and_not_the_teacher(self, name):
        student, teacher, learner = self.build(name)
        before, of_teacher = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
        row = learner.epoch(0, "")
        assert "learning_rate" in row and all(math.isfinite(value) for value in row.values())
        assert not torch.equal(student.state_dict()["fc2.weight"], before["fc2.weight"])
        assert all(torch.equal(value, of_teacher[key]) for key, value in teacher.state_dict().items())
        assert not teacher.training and learner.num_images > 0
        for images in learner.epoch_images().values():
            assert images.shape[1:] == (3, 32, 32) and images.min() >= 0 and images.max() <= 1

    def test_continues_bit_for_bit(self, name):
        def epoch(learner, number):
            torch.manual_seed(number)  # as a run does
            return learner.epoch(number, "")

        student, _, learner = self.build(name)
        epoch(learner, 0)
        saved = copy.deepcopy((student.state_dict(), learner.state_dict()))
        row = epoch(learner, 1)
        student, _, learner = self.build(name)
        student.load_state_dict(saved[0])
        learner.load_state_dict({**saved[1], "epoch": 1})
        assert epoch(learner, 1) == row


def test_log_probabilities_equal_logits_up_to_a_constant():
    logits = torch.tensor([[2000.0, 0.0, -300.0]])
    torch.testing.assert_close(Answers("probabilities")(logits), logits - 2000)


def test_a_frozen_network_stays_in_eval_mode_behind_an_interface():
    network = Small()
    frozen = Frozen(network, Answers("label"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    part = Images(torch.randint(256, (6, SIZE, SIZE, 3)).byte(), torch.arange(6) % CLASSES, torch.zeros(3),
                  torch.ones(3))
    Evaluation({"test": part}, torch.float32)(frozen.with_interface)
    frozen(Batch(torch.randn(4, 3, SIZE, SIZE), torch.arange(4), torch.arange(4), torch.tensor(0.0)))
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_zeros_of_an_interface_do_not_count_as_non_finite_outputs(monkeypatch):
    def top_1(strength):
        return lambda probabilities: nn.functional.one_hot(probabilities.argmax(1), CLASSES).float()

    monkeypatch.setitem(INTERFACES._loaded(), "one_hot", Entry("one_hot", top_1, "", ""))
    answers = Answers("one_hot")
    assert answers(torch.randn(4, CLASSES)).isneginf().sum() == 4 * (CLASSES - 1)
    part = Images(torch.zeros(6, SIZE, SIZE, 3, dtype=torch.uint8), torch.arange(6) % CLASSES, torch.zeros(3),
                  torch.ones(3))
    row = Evaluation({"test": part}, torch.float32)(Frozen(Small(), answers).with_interface)
    assert 0 < row["test_loss"] < 14  # -log 1e-6


@pytest.mark.parametrize(("build", "specification", "words"), [
    (build_interface, "logit", "did you mean 'logits'"), (build_interface, "logits:2", "takes no strength"),
    (build_answer_defense, "nothing", "unknown answer defense 'nothing'"), (build_answer_defense, "none:1", "none:1")])
def test_an_unknown_or_malformed_transform_is_named(build, specification, words):
    with pytest.raises(ValueError, match=words):
        build(specification)


def test_an_attack_accepts_only_its_own_parameters():
    assert build_attack("kd", 10, temperature=2.0).params.temperature == 2.0
    with pytest.raises(ValueError, match="beta"):
        build_attack("kd", 10, beta=8.0)
    with pytest.raises(ValueError, match="did you mean 'dkd'"):
        build_attack("DKD", 10)


def test_parameters_of_a_method_have_their_own_learning_rate():
    class Scaled(attacks.REGISTRY["kd"]):
        def __init__(self, params, num_classes):
            super().__init__(params, num_classes)
            self.scale = nn.Parameter(torch.ones(num_classes))

        def forward(self, student, batch, answers):
            return super().forward(student, batch, answers * self.scale)

    class Adam(Scaled):
        def build_optimizer(self, learning_rate):
            return torch.optim.Adam(self.parameters(), lr=learning_rate / 100)

    pixels = torch.randint(256, (COUNT, SIZE, SIZE, 3)).byte()
    batches = TrainBatches(Images(pixels, torch.arange(COUNT) % CLASSES, torch.zeros(3), torch.ones(3)), 6, None, 0)
    params = SimpleNamespace(learning_rate=0.1, annealing="steps", schedule=[0], gamma=0.5, optimizer="sgd",
                             compile="auto", cuda_graph="auto", num_epochs=1)
    answers = torch.randn(COUNT, CLASSES)
    rates = {}
    for kind in (Scaled, Adam):
        attack = kind(kind.Params(), CLASSES)
        def loss(network, batch, attack=attack):
            return attack(network, batch, answers[batch.index])

        learner = Supervised(Small(), loss, batches, params, torch.float32, attack)
        learner.setup(print)
        learner.epoch(0, "")
        assert not torch.equal(attack.scale.detach(), torch.ones(CLASSES))
        rates[kind] = [group["lr"] for optimizer in learner.step.optimizers for group in optimizer.param_groups]
    assert rates == {Scaled: [0.05, 0.05], Adam: [0.05, 0.001]}
