"""Trained-in defenses: values computed by hand, and short runs of each."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, results, same_to_the_bit
from torch import nn

import defenses
from defenses.ast import exponential_divergence
from defenses.moving import random_views, reinitialize
from model import build_model
from runs.stages import NASTY
from utils.augment import normalize
from utils.data import Batch, Images, TrainBatches
from utils.errors import UserError
from utils.evaluation import Frozen
from utils.losses import kl_divergence, nasty_terms
from utils.supervised import Supervised

COUNT, CLASSES = 6, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 0])
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def build(name, classes=CLASSES, frozen=None, **parameters):
    method = defenses.REGISTRY[name]
    required = {key: "x" for key, field in method.Params.model_fields.items() if field.is_required()}
    roles = dict.fromkeys(method.frozen_roles, frozen)
    return method(method.Params(**required, **parameters), classes, **roles)


def small(seed=0, name="net"):
    torch.manual_seed(seed)
    return build_model(name, CLASSES, num_channels=4)


def images_of(seed=0):
    pixels = torch.randint(256, (COUNT, 32, 32, 3), generator=torch.Generator().manual_seed(seed)).byte()
    return normalize(pixels, MEAN, STD)


def batch_of(images=None, labels=LABELS):
    images = images_of() if images is None else images
    return Batch(images, labels, torch.arange(len(labels)), torch.tensor(0.0))


def logits_of(seed, rows=COUNT):
    return 3 * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)


def assert_gradients(network, expected):
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def changed(network, before):
    """Names of the entries of the state dict that have changed."""
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


# -- nasty, and its fast forms -------------------------------------------------------------------------------------


@pytest.fixture
def nasty():
    return lambda **parameters: build("nasty", frozen=Frozen(small(1)), **parameters)


def test_nasty_is_bit_for_bit_the_published_loss(nasty):
    network, defense, batch = small(), nasty(), batch_of()
    other = copy.deepcopy(network)
    terms = defense(network, batch)
    expected = nasty_terms(other(batch.images), defense.adversary(batch), LABELS, temperature=4.0, weight=0.04)
    assert list(terms) == list(expected) and all(torch.equal(terms[name], expected[name]) for name in terms)
    terms["loss"].backward()
    expected["loss"].backward()
    assert all(torch.equal(*pair) for pair in zip((p.grad for p in network.parameters()),
                                                  (p.grad for p in other.parameters()), strict=True))


def test_half_only_has_the_kl_gradient_in_the_classifier(nasty):
    network, defense, batch = small(), nasty(kl_layers="classifier", weight=2.0), batch_of()
    other = copy.deepcopy(network)
    terms = defense(network, batch)
    terms["loss"].backward()
    expected = nasty_terms(other(batch.images), defense.adversary(batch), LABELS, temperature=4.0, weight=2.0)
    torch.testing.assert_close(terms["loss"], expected["loss"])
    everywhere, ordinary = gradients(expected["loss"], other), gradients(expected["cross_entropy"], other)
    assert_gradients(network, [whole if name.startswith("fc2.") else part for (name, _), whole, part in
                               zip(other.named_parameters(), everywhere, ordinary, strict=True)])


@pytest.mark.parametrize(("name", "layer"), [("net", "fc2"), ("mobilenetv2", "conv2")])
def test_light_only_trains_the_classifier(nasty, name, layer):
    network, defense = small(name=name), nasty(trained_layers="classifier")
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    network.train()
    for _ in range(2):
        defense(network, batch_of())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert network.training and all(module.training for module in network.modules())
    assert changed(network, before) == {f"{layer}.weight", f"{layer}.bias"}


@pytest.mark.parametrize("key", ["trained_layers", "kl_layers"])
def test_a_fast_form_refuses_a_network_without_a_classifier(nasty, key):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(UserError, match=f'"{key}"'):
        nasty(**{key: "classifier"}).prepare(nn.Sequential(network, nn.AdaptiveAvgPool1d(CLASSES)), images_of())


# -- label smoothing -----------------------------------------------------------------------------------------------


def test_label_smoothing_is_the_cross_entropy_with_smoothed_labels():
    logits = logits_of(0)
    loss = build("label_smoothing", epsilon=0.3)(lambda images: logits, batch_of())["loss"]
    assert torch.equal(loss, F.cross_entropy(logits, LABELS, label_smoothing=0.3))


# -- CMIM ----------------------------------------------------------------------------------------------------------


def test_cmim_compares_outputs_with_the_mean_of_their_class():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.1, 0.2]])
    logits, labels = probabilities.log(), torch.tensor([1, 1])
    defense = build("cmim", temperatures=[1.0], weight=3.0)
    terms = defense(lambda images: logits, batch_of(torch.zeros(2, 3, 8, 8), labels))
    mean = (0.6, 0.2, 0.2)
    term = sum(p * math.log(p / q) for row in probabilities.tolist() for p, q in zip(row, mean, strict=True)) / 2
    assert terms["cmi"].item() == pytest.approx(term, rel=1e-5)
    ce = -(math.log(0.3) + math.log(0.1)) / 2
    assert terms["loss"].item() == pytest.approx(ce + 3 * term, rel=1e-5)


def test_cmim_is_a_mean_over_temperatures_with_a_factor_of_their_squares():
    logits = logits_of(0)
    terms = build("cmim", temperatures=[2.0, 8.0])(lambda images: logits, batch_of())
    expected = 0.0
    for temperature in (2.0, 8.0):
        p = (logits / temperature).softmax(1)
        means = torch.stack([p[label == LABELS].mean(0) for label in LABELS])
        expected += temperature**2 * (p * (p / means).log()).sum(1).mean() / 2
    torch.testing.assert_close(terms["cmi"], expected)


def test_cmim_takes_the_means_of_earlier_batches_into_account():
    first, second = logits_of(0), logits_of(1)
    defense = build("cmim", temperatures=[1.0])
    defense(lambda images: first, batch_of())
    terms = defense(lambda images: second, batch_of())
    p, q = second.softmax(1), (0.99 * first.softmax(1) + second.softmax(1)) / 1.99
    means = torch.stack([q[label == LABELS].mean(0) for label in LABELS])
    torch.testing.assert_close(terms["cmi"], (p * (p / means).log()).sum(1).mean())


def test_cmim_is_zero_when_all_images_of_a_class_have_one_output():
    defense = build("cmim")
    for _ in range(3):
        terms = defense(lambda images: logits_of(0, CLASSES)[LABELS], batch_of())
    assert terms["cmi"].item() == pytest.approx(0, abs=1e-4)


def test_no_gradient_passes_through_the_means_of_cmim():
    logits = logits_of(0).requires_grad_()
    terms = build("cmim", temperatures=[1.0])(lambda images: logits, batch_of())
    alone = logits_of(0).requires_grad_()
    means = torch.stack([alone.detach().softmax(1)[label == LABELS].mean(0) for label in LABELS])
    expected, = torch.autograd.grad(kl_divergence(alone, means.log(), temperature=1), alone)
    torch.testing.assert_close(torch.autograd.grad(terms["cmi"], logits)[0], expected)


# -- moving adversary ----------------------------------------------------------------------------------------------


@pytest.fixture
def moved():
    """A step of the moving adversary: defense, network, copies of both before the step, batch and views."""
    network, defense, batch = small(), build("moving", temperature=2.0, weight=0.5), batch_of()
    defense.prepare(network, batch.images)
    before = copy.deepcopy((network, defense.student))
    torch.manual_seed(7)
    terms = defense(network, batch)
    terms["loss"].backward()
    torch.manual_seed(7)
    return SimpleNamespace(defense=defense, network=network, before=before, batch=batch, terms=terms,
                           views=random_views(batch.images))


def test_the_student_is_constant_in_the_networks_loss(moved):
    logits, student = moved.before[0](moved.batch.images), moved.defense.student.eval()
    kl = 4 * kl_divergence(logits, student(moved.batch.images).detach(), temperature=2)
    assert_gradients(moved.network, gradients(F.cross_entropy(logits, LABELS) - 0.5 * kl, moved.before[0]))
    torch.testing.assert_close(moved.terms["kl"], kl)


def test_the_network_is_constant_in_the_students_loss(moved):
    answers = moved.network.eval()(moved.views).detach()
    kl = 4 * kl_divergence(answers, moved.before[1](moved.views), temperature=2)
    assert_gradients(moved.defense.student, gradients(kl, moved.before[1]))
    torch.testing.assert_close(moved.terms["student_kl"], kl)


def test_running_statistics_of_network_and_student_move_once_in_a_step(moved):
    assert moved.network.bn1.num_batches_tracked == moved.defense.student.bn1.num_batches_tracked == 1
    assert moved.network.training and moved.network.bn1.training and moved.defense.student.bn1.training


def test_the_student_is_like_the_network_with_weights_of_its_own():
    network, defense = small(), build("moving")
    for parameter in network.parameters():
        nn.init.constant_(parameter, 3.0)
    network(images_of())
    defense.prepare(network, images_of())
    student, fresh = defense.student.state_dict(), small().state_dict()
    assert student.keys() == fresh.keys()
    assert not any((value == 3.0).any() for value in student.values())
    assert not student["bn1.running_mean"].any() and not student["bn1.num_batches_tracked"]


def test_matrices_outside_known_layers_are_reinitialized():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.inner = nn.Parameter(torch.empty(1, 5, 4)), nn.MultiheadAttention(4, 2)

    network = Attention()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 3.0)
    reinitialize(network)
    assert not any((parameter == 3.0).any() for parameter in network.parameters())


def test_the_student_may_be_another_network_of_the_zoo():
    defense = build("moving", student_model="net", student_num_channels=2)
    defense.prepare(small(), images_of())
    assert defense.student.conv1.out_channels == 2
    optimizer = defense.build_optimizer(0.1)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert len(optimizer.param_groups[0]["params"]) == len(list(defense.student.parameters()))


def test_views_are_flipped_and_shifted_images():
    images = torch.arange(64 * 3 * 16 * 16).view(64, 3, 16, 16).float()
    views = random_views(images)
    middle = slice(2, -2)  # as shifts are of up to two pixels
    shifts = [(down, across) for down in range(-2, 3) for across in range(-2, 3)]

    def candidates(image):
        for each in (image, image.flip(2)):
            yield from (each.roll(shift, (1, 2))[:, middle, middle] for shift in shifts)

    found = [[torch.equal(view[:, middle, middle], each) for each in candidates(image)].index(True)
             for image, view in zip(images, views, strict=True)]
    assert len(set(found)) > 20


# -- AST -----------------------------------------------------------------------------------------------------------


def ast(**parameters):
    defense = build("ast", **parameters)
    defense.normalization = MEAN, STD
    return defense


def test_the_divergence_of_ast_rewards_peaks():
    one_hot, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.4]])
    expected = math.exp(0.6) * (0.6 - 1) + math.exp(0.4) * 0.4
    assert exponential_divergence(one_hot, q).item() == pytest.approx(expected) == pytest.approx(-0.13, abs=0.005)
    assert exponential_divergence(q, q).item() == 0


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_adversarial_examples_stay_near_and_are_images(epsilon):
    network, batch = small().eval(), batch_of()
    adversarial = ast(epsilon=epsilon, step_size=epsilon / 2).attack(network, batch)
    pixels, original = (each * STD.view(3, 1, 1) + MEAN.view(3, 1, 1) for each in (adversarial, batch.images))
    assert (pixels - original).abs().max().item() == pytest.approx(epsilon, abs=1e-5)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert F.cross_entropy(network(adversarial), LABELS) > F.cross_entropy(network(batch.images), LABELS)


def test_ast_uses_the_sparse_outputs_for_the_same_image():
    network, batch, defense = small(), batch_of(), ast(alpha=0.25, temperature=2.0)
    other = copy.deepcopy(network)
    defense(network, batch)["loss"].backward()
    assert network.bn1.num_batches_tracked == 1 and network.bn1.training
    logits = other(batch.images)
    other.eval()
    target = other(defense.attack(other, batch)).detach() / 2
    target = target.masked_fill(target == target.min(1, keepdim=True).values, -torch.inf).softmax(1)
    expected = 0.75 * F.cross_entropy(logits, LABELS) + exponential_divergence((logits / 2).softmax(1), target)
    assert_gradients(network, gradients(expected, other))


def test_more_peaks_than_classes_are_refused():
    with pytest.raises(UserError, match="top_k"):
        build("ast", top_k=4)


def test_ast_has_the_published_values_of_the_data_set():
    def params(dataset):
        values = {"dataset": dataset, "model_name": "net", "learning_rate": 0.1, "num_epochs": 1, "defense": "ast"}
        found = NASTY.params_by("ast").model_validate(values)
        return found.alpha, found.temperature, found.top_k

    assert (params("cifar10"), params("cifar100")) == ((0.05, 6.0, 2), (0.035, 30.0, 7))


def test_a_learner_passes_the_normalization_to_its_method():
    part = Images(torch.zeros(COUNT, 32, 32, 3, dtype=torch.uint8), LABELS, MEAN, STD)
    params = SimpleNamespace(learning_rate=0.1, optimizer="sgd")
    defense = build("ast")
    Supervised(small(), defense, TrainBatches(part, 3, None, 0), params, torch.float32, defense)
    assert defense.normalization == (MEAN, STD)


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(call, experiment):
    """Parameters of a run that starts from trained weights."""
    directory = experiment("start", num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    path = str(directory / "last_model.tar")
    adversary = {"adversarial_model": "net", "adversarial_num_channels": 4, "adversarial_resume": path}
    return lambda name: {"defense": name, "init_from": path, **(adversary if name == "nasty" else {})}


@pytest.mark.parametrize(("name", "parameters"), [
    *((name, {}) for name in defenses.REGISTRY), ("nasty", {"trained_layers": "classifier"}),
    ("nasty", {"kl_layers": "classifier"})])
def test_every_defense_trains_a_network_from_trained_weights(call, experiment, start, name, parameters):
    directory = experiment(num_epochs=1, **start(name), **parameters)
    done = call("train_nasty", directory)
    assert done.returncode == 0, done.stderr
    assert math.isfinite(results(directory)["last"]["loss"])


@pytest.mark.parametrize("name", ["cmim", "moving"])
def test_a_run_of_one_plus_one_epochs_equals_one_of_two(call, experiment, name):
    whole, parts = (experiment(directory, defense=name) for directory in ("whole", "parts"))
    assert call("train_nasty", whole).returncode == 0
    assert call("train_nasty", parts, "--set", "num_epochs=1").returncode == 0
    done = call("train_nasty", parts)
    assert done.returncode == 0 and "resuming after epoch 1" in done.stdout, done.stderr
    one = same_to_the_bit(whole, parts)
    assert one["learner"]["method"]


def test_a_student_that_is_no_network_of_the_zoo_is_refused(call, experiment):
    directory = experiment(defense="moving", student_model="resnet17")
    assert "resnet17" in refused(call, "train_nasty", directory)
