"""Attacks with their own parameters or running averages, and controls, which repeat another attack."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, results, same_to_the_bit
from torch import nn

from attacks import build_attack
from attacks.control import ControlParams
from attacks.skeptical import Head
from model import build_model
from runs.stages import KD
from utils.data import Batch
from utils.errors import UserError
from utils.losses import kd_loss, kl_divergence
from utils.means import ClassMeans

COUNT, CLASSES = 6, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 0])


def logits_of(seed, rows=COUNT, classes=CLASSES):
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def batch_of(images=None, labels=LABELS, epoch=0.0):
    return Batch(torch.zeros(COUNT, 3, 8, 8) if images is None else images, labels, torch.arange(COUNT),
                 torch.tensor(epoch))


def student_of(logits):
    return lambda images: logits


# -- class means and the averager ----------------------------------------------------------------------------------


def test_class_means_are_a_bias_corrected_moving_average_by_class():
    means = ClassMeans(2, decay=0.9)
    first = means(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(first, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    second = means(torch.tensor([[5.0, 1.0], [7.0, 7.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(second, torch.tensor([[(0.9 * 4 + 5) / (0.9 * 2 + 1), 1 / 2.8], [7.0, 7.0]]))
    third = means(torch.tensor([[1.0, 1.0]]), torch.tensor([1]))
    torch.testing.assert_close(third, torch.tensor([[7.3 / 1.9, 7.3 / 1.9]]))
    assert means.weights.tolist() == pytest.approx([2.8, 1.9])  # class 0 was absent, so its mean does not decay


def by_class(values):
    return torch.stack([values[label == LABELS].mean(0) for label in range(CLASSES)])[LABELS]


def test_the_averager_distils_the_class_means_of_the_log_probabilities():
    answers, logits = logits_of(0), logits_of(1)
    terms = build_attack("averager", CLASSES)(student_of(logits), batch_of(), answers)
    torch.testing.assert_close(terms["loss"], kd_loss(logits, by_class(answers), LABELS, temperature=20, alpha=0.9))


@pytest.mark.parametrize("kind", ["ema", "batch"])
def test_only_the_moving_average_uses_earlier_batches(kind):
    attack, logits = build_attack("averager", CLASSES, class_mean=kind, temperature=2.0), logits_of(1)
    first, second = logits_of(2).log_softmax(1), logits_of(3).log_softmax(1)
    attack(student_of(logits), batch_of(), first)
    terms = attack(student_of(logits), batch_of(), second)
    mean = by_class(second) if kind == "batch" else (0.99 * by_class(first) + by_class(second)) / 1.99
    torch.testing.assert_close(terms["kl"], 4 * kl_divergence(mean, logits, temperature=2))


def test_without_labels_the_averager_groups_by_the_top_class():
    answers, logits = logits_of(0), logits_of(1)
    given, found = (build_attack("averager", CLASSES, alpha=1.0)(student_of(logits), batch_of(labels=labels), answers)
                    for labels in (answers.argmax(1), None))
    assert torch.equal(given["loss"], found["loss"])


# -- controls ------------------------------------------------------------------------------------------------------


def test_the_uniform_control_of_kd_is_kd_towards_the_uniform_answer():
    attack, logits = build_attack("uniform", CLASSES, of_parameters={"temperature": 3}), logits_of(1)
    terms = attack(student_of(logits), batch_of(), logits_of(0).masked_fill(logits_of(0) < 0, -torch.inf))
    expected = kd_loss(logits, torch.zeros(COUNT, CLASSES), LABELS, temperature=3, alpha=0.9)
    torch.testing.assert_close(terms["loss"], expected)


def test_the_class_mean_control_of_kd_is_kd_towards_the_mean_probabilities():
    answers, logits = logits_of(0), logits_of(1)
    answers[:, 2] = -torch.inf
    terms = build_attack("class_mean", CLASSES)(student_of(logits), batch_of(), answers)
    expected = kd_loss(logits, by_class(answers.softmax(1)).log(), LABELS, temperature=4, alpha=0.9)
    torch.testing.assert_close(terms["loss"], expected)


def test_a_control_without_labels_keeps_the_top_class_of_the_answer():
    answers, logits = logits_of(0), logits_of(1)
    given, found = (build_attack("uniform", CLASSES, of="dkd")(student_of(logits), batch_of(labels=labels), answers)
                    for labels in (answers.argmax(1), None))
    assert torch.equal(given["loss"], found["loss"])


@pytest.mark.parametrize(("parameters", "words"), [
    ({"of": "KDD"}, ["unknown attack 'KDD'"]), ({"of": "uniform"}, ['"uniform"', "which is a control"]),
    ({"of_parameters": {"beta": 8}}, ['"kd"', 'unknown key "beta"']),
    ({"of": "dkd", "of_parameters": {"beta": -1}}, ['"dkd"', '"beta" is -1', "greater than or equal to 0"]),
    ({"of": 3}, ["of", "string"]), ({"of_parameters": 3}, ["of_parameters", "dictionary"])])
@pytest.mark.parametrize("name", ["uniform", "class_mean"])
def test_a_control_refuses_a_bad_attack_and_bad_parameters(name, parameters, words):
    with pytest.raises(ValueError) as error:
        build_attack(name, CLASSES, **parameters)
    assert all(word in str(error.value) for word in words)


def test_a_run_with_a_bad_attack_of_a_control_ends_in_one_line(call, experiment):
    directory = experiment(attack="uniform", of="dkd", of_parameters={"gamma": 1}, teacher_model="net",
                           teacher_resume="x.tar")
    assert '"of_parameters" of the attack "dkd": unknown key "gamma"' in refused(call, "train_kd", directory)


@pytest.mark.parametrize(("dataset", "given", "temperature"), [
    ("cifar10", {}, 4.0), ("cifar100", {}, 20.0), ("cifar100", {"temperature": 2.0}, 2.0)])
def test_a_control_takes_the_published_values_of_the_data_set(dataset, given, temperature):
    params = KD.params_by("uniform").model_validate(
        {"dataset": dataset, "model_name": "net", "learning_rate": 0.1, "num_epochs": 1, "attack": "uniform",
         "teacher_model": "net", "teacher_resume": "x.tar", "of_parameters": given})
    assert params.attack_params.temperature == temperature
    assert params.control_of == "kd"


def test_a_control_uses_labels_as_its_attack_does():
    alone = {"of_parameters": {"alpha": 1.0}}
    uniform, mean = (build_attack(name, CLASSES, **alone).params for name in ("uniform", "class_mean"))
    assert (uniform.reads_labels, mean.reads_labels) == (False, True)
    assert uniform.needs_labels == mean.needs_labels == ""
    assert "alpha" in ControlParams().needs_labels
    assert build_attack("kd", CLASSES).params.control_of == ""


def test_a_control_trains_the_parameters_of_its_attack():
    attack = build_attack("uniform", CLASSES, of="mkd")
    optimizer = attack.build_optimizer(0.1)
    assert len(optimizer.param_groups[0]["params"]) == 3
    attack = build_attack("class_mean", 10, of="skeptical")
    attack.prepare(build_model("net", 10, num_channels=4), torch.zeros(2, 3, 32, 32))
    assert len(attack.attack.heads) == 2


# -- MKD -----------------------------------------------------------------------------------------------------------


def mkd(**parameters):
    torch.manual_seed(5)
    return build_attack("mkd", CLASSES, **parameters)


def test_rows_of_the_matrices_and_targets_are_distributions():
    attack, answers = mkd(), logits_of(0)
    answers[:, 2] = -torch.inf
    rows, targets = attack.log_matrices(LABELS).exp().sum(2), attack.log_targets(answers, LABELS).exp()
    torch.testing.assert_close(rows, torch.ones(COUNT, CLASSES))
    torch.testing.assert_close(targets.sum(1), torch.ones(COUNT))
    q = (answers / 4).softmax(1)
    torch.testing.assert_close(targets, torch.einsum("bi,bij->bj", q, attack.log_matrices(LABELS).exp()))


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_without_u_and_v_the_diagonal_starts_at_nine_tenths(classes):
    attack = build_attack("mkd", classes)
    nn.init.zeros_(attack.left)
    diagonal = attack.log_matrices(torch.arange(2)).exp().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.full((2, classes), 0.9))


def test_student_and_matrices_treat_each_other_as_constants():
    attack, answers, logits = mkd(), logits_of(0), logits_of(1).requires_grad_()
    attack(student_of(logits), batch_of(), answers)["loss"].backward()
    own = [parameter.grad.clone() for parameter in attack.parameters()]
    alone = logits.detach().clone().requires_grad_()
    targets = attack.log_targets(answers, LABELS)
    kl = 16 * kl_divergence(4 * targets.detach(), alone, temperature=4)
    expected = 0.9 * kl + 0.1 * F.cross_entropy(alone, LABELS)
    torch.testing.assert_close(logits.grad, torch.autograd.grad(expected, alone)[0])
    of_matrices = 0.9 * 16 * kl_divergence(4 * targets, alone.detach(), temperature=4)
    for gradient, parameter in zip(torch.autograd.grad(of_matrices, list(attack.parameters())), own, strict=True):
        torch.testing.assert_close(parameter, gradient)


def test_matrices_use_adam_at_a_hundredth_of_the_learning_rate():
    optimizer = mkd().build_optimizer(0.1)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_autocast_does_not_round_the_targets():
    attack, answers = mkd(), logits_of(0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attack.log_targets(answers, LABELS)
    assert torch.equal(rounded, attack.log_targets(answers, LABELS))


# -- skeptical -----------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, features):
        return self.logits


class Student(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.trunk, self.logits = nn.Identity(), nn.Parameter(logits)

    def forward(self, images):
        self.trunk(images)
        return self.logits


@pytest.fixture
def skeptical():
    attack = build_attack("skeptical", CLASSES)
    attack.heads, attack.places = nn.ModuleList([Constant(logits_of(1)), Constant(logits_of(2))]), ("trunk", "trunk")
    return attack


def test_the_loss_after_the_delay_is_that_of_the_paper(skeptical):
    h0, h1, h2, answers = (logits_of(seed) for seed in range(4))
    loss = skeptical(Student(h0), batch_of(epoch=21.0), answers)["loss"]
    expected = (0.9 * 400 * kl_divergence(answers, h2, temperature=20) + 0.1 * F.cross_entropy(h2, LABELS)
                + 0.3 * kl_divergence(h0, h1, temperature=20) + 0.7 * F.cross_entropy(h1, LABELS)
                + F.cross_entropy(h0, LABELS))
    torch.testing.assert_close(loss, expected)


def test_up_to_the_delay_only_the_output_learns_from_the_labels(skeptical):
    loss = skeptical(Student(logits_of(0)), batch_of(epoch=20.0), logits_of(3))["loss"]
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits_of(0), LABELS))
    assert not any(parameter.grad.any() for parameter in skeptical.parameters())


def test_the_output_gets_no_gradient_from_the_head_that_it_teaches(skeptical):
    student = Student(logits_of(0))
    skeptical(student, batch_of(epoch=21.0), logits_of(3))["loss"].backward()
    alone = logits_of(0).requires_grad_()
    torch.testing.assert_close(student.logits.grad, torch.autograd.grad(F.cross_entropy(alone, LABELS), alone)[0])


def test_without_labels_the_skeptical_student_learns_the_top_classes(skeptical):
    student, answers = Student(logits_of(0)), logits_of(3)
    given, found = (skeptical(student, batch_of(labels=labels, epoch=21.0), answers)["loss"]
                    for labels in (answers.argmax(1), None))
    assert torch.equal(given, found)


@pytest.mark.parametrize(("name", "places", "halvings"), [
    ("net", ("bn2", "bn1"), [1, 2]), ("resnet18", ("layer3", "layer2"), [1, 2]),
    ("shufflenetv2", ("stage3", "stage2"), [1, 2]), ("mobilenetv2", ("stage3", "stage2"), [1, 2]),
    ("mlp", ("fc3", "fc3"), [])])
def test_heads_are_attached_to_the_stages_before_the_last_or_to_the_features(name, places, halvings):
    network, images = build_model(name, 10), torch.randn(2, 3, 32, 32)
    attack = build_attack("skeptical", 10, delay=-1)
    attack.prepare(network, images)
    before = [parameter.clone() for parameter in attack.parameters()]
    attack.prepare(network, images)
    assert all(torch.equal(*pair) for pair in zip(before, attack.parameters(), strict=True))
    assert attack.places == places
    strides = [sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in head.body)
               for head in attack.heads if isinstance(head, Head)]
    assert strides == halvings
    batch = Batch(images, torch.tensor([1, 2]), torch.arange(2), torch.tensor(0.0))
    attack(network, batch, torch.randn(2, 10))["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in (*network.parameters(), *attack.parameters()))


def test_a_network_of_two_stages_has_both_heads_on_its_first():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    attack = build_attack("skeptical", CLASSES)
    terms = attack(network, batch_of(torch.randn(COUNT, 3, 16, 16), epoch=21.0), logits_of(0))
    assert attack.places == ("0", "0") and terms["loss"].isfinite()


def test_a_network_without_stages_and_linear_layer_is_refused():
    with pytest.raises(UserError, match="skeptical"):
        build_attack("skeptical", CLASSES)(nn.Flatten(), batch_of(), logits_of(0))


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [
    {"attack": "averager"}, {"attack": "mkd"}, {"attack": "skeptical", "delay": 0},
    {"attack": "class_mean", "of": "mkd"}])
def test_a_run_of_one_plus_one_epochs_equals_one_of_two(call, experiment, attack):
    teacher = experiment("teacher", num_epochs=1)
    assert call("train_scratch", teacher).returncode == 0
    whole, parts = (experiment(name, **attack, teacher_model="net", teacher_num_channels=4,
                               teacher_resume=str(teacher / "last_model.tar")) for name in ("whole", "parts"))
    assert call("train_kd", whole).returncode == 0
    assert call("train_kd", parts, "--set", "num_epochs=1").returncode == 0
    done = call("train_kd", parts)
    assert done.returncode == 0 and "resuming after epoch 1" in done.stdout, done.stderr
    one = same_to_the_bit(whole, parts)
    assert ("method_optim_dict" in one["learner"]) == ("mkd" in attack.values())
    assert one["learner"]["method"] and not set(one["state_dict"]) & set(one["learner"]["method"])
    assert math.isfinite(results(whole)["last"]["loss"])
