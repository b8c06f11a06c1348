"""Every registered attack, defense, answer defense and interface keeps its contract."""
from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attacks
import defenses
from attacks import build_attack
from attacks.base import Attack
from defenses.answers import ANSWER_DEFENSES, INTERFACES, Answers, build_answer_defense, build_interface
from utils.data import Batch, Images, TrainBatches
from utils.evaluation import Evaluation, Frozen
from utils.registry import Entry
from utils.supervised import Supervised

CLASSES, SIZE, COUNT = 4, 8, 12


class Small(nn.Module):
    """A network with batch norm and a fixed scale of its logits."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                      nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier, self.scale = nn.Linear(4, CLASSES), scale

    def forward(self, images):
        return self.classifier(self.features(images)) * self.scale


class NoHostSync(TorchDispatchMode):
    """Fails on operations for which a GPU has to wait, and that a CUDA graph cannot record.

    A boolean index is one: the number of its elements is a value. `masked_fill` and `where` do without.
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
    """Fail if a step of the loss `build(answers)` reads a value: on the CPU, where operations are looked at, and on the
    meta device, whose tensors have none, so that `.tolist()`, for example, raises."""
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
        if case == "zeros":  # an interface that gives away two classes
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

    def test_leaves_batch_and_answers_as_they_are(self, kind, name, batch, answers):
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
    """An attack that does something with its logits."""

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
    """Names that need no strength, and others with one that they take."""
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


def test_probabilities_are_the_logits_up_to_a_constant_however_sure_the_network_is():
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


def test_zeros_of_an_interface_are_no_fault_of_the_network(monkeypatch):
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
def test_an_unknown_or_badly_given_transform_is_named(build, specification, words):
    with pytest.raises(ValueError, match=words):
        build(specification)


def test_an_attack_takes_its_own_parameters_only():
    assert build_attack("kd", 10, temperature=2.0).params.temperature == 2.0
    with pytest.raises(ValueError, match="beta"):
        build_attack("kd", 10, beta=8.0)
    with pytest.raises(ValueError, match="did you mean 'dkd'"):
        build_attack("DKD", 10)


def test_own_parameters_of_a_method_are_trained_with_a_rate_of_their_own():
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
