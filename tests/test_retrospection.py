"""Self-retrospection: closed-form hypergradient, perturbation, and effect of a step on the student."""
import copy
import math

import pytest
import torch
from torch import nn

from datafree.retrospection import Retrospection, hypergradient
from model.wideresnet import WideResNet
from utils import seeds
from utils.losses import kl_divergence


def network(seed):
    """A network whose outputs depend on its input: random weights, decided logits, statistics of random images."""
    torch.manual_seed(seed)
    model = WideResNet(10, 1, 4).train()
    model.fc.weight.data *= 10
    for _ in range(20):
        model(torch.randn(16, 3, 16, 16))
    return model


@pytest.fixture(scope="module")
def networks():
    return network(0), network(1).eval()


@pytest.fixture
def student(networks):
    return copy.deepcopy(networks[0])


@pytest.fixture
def teacher(networks):
    return networks[1]


IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def random():
    return seeds.generator(0, "retrospection")


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "num_b" in name}


def changed(model, before):
    return any(not torch.equal(value, before[name]) for name, value in statistics(model).items())


A, B, C, Q, ETA = 1.0, 2.0, 0.5, 0.5, 0.1


def quadratic(steps, dtype=torch.float64):
    """g = a d^2 / 2 - b h d and f = (d - c)^2 / 2 + q h^2 / 2 at d = 1, h = 3."""
    h = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    return hypergradient(lambda d: 0.5 * A * d**2 - B * h * d, lambda d: 0.5 * (d - C)**2 + 0.5 * Q * h**2,
                         torch.tensor(1.0, dtype=dtype), [h], steps=steps, eta=ETA)[0].item()


@pytest.mark.parametrize(("steps", "expected"), [(1, 1.6), (2, 1.69), (5, 1.90951), (50, 2.494846)])
def test_the_hypergradient_of_a_quadratic_has_the_known_values(steps, expected):
    closed_form = ETA * B * (1 - C) * sum((1 - ETA * A)**k for k in range(steps)) + Q * 3
    assert quadratic(steps) == pytest.approx(expected, abs=1e-6)
    assert quadratic(steps) == pytest.approx(closed_form, rel=1e-12)


def test_the_hypergradient_of_a_quadratic_converges_to_the_implicit_one():
    """delta(h) = b h / a, so d f / d h = (d - c) b / a + q h = 2.5."""
    assert quadratic(1000) == pytest.approx(2.5, rel=1e-12)


def test_at_the_inner_minimum_it_is_the_gradient_through_the_solution():
    """For g = |A d - W h|^2 / 2, delta(h) = A^-1 W h is known, and so is the total derivative of f(delta(h), h)."""
    torch.manual_seed(0)
    a = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(3, 3, dtype=torch.float64)
    w = torch.randn(3, 2, dtype=torch.float64)
    h = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def outer(d):
        return d.sin().sum() + (d[0] * h).sum() + h.pow(3).sum()

    minimum = torch.linalg.solve(a, w @ h)
    expected, = torch.autograd.grad(outer(minimum), h)
    result, = hypergradient(lambda d: 0.5 * (a @ d - w @ h).square().sum(), outer, minimum, [h], steps=2000, eta=0.3)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)


def test_a_parameter_of_neither_objective_gets_zero_and_one_of_either_gets_its_part():
    shared, of_inner, of_outer, of_none = (torch.tensor([2.0], requires_grad=True) for _ in range(4))
    delta = torch.tensor([1.0])
    results = hypergradient(lambda d: (shared * d**2 + of_inner * d).sum(), lambda d: (of_outer * shared * d).sum(),
                            delta, [shared, of_inner, of_outer, of_none], steps=1, eta=0.1)
    # v_1 = d f / d d = 4; f_theta = (2, 0, 2, 0); the gradient of d g / d d = 2 s d + i by theta is (2, 1, 0, 0).
    assert [result.item() for result in results] == pytest.approx([2 - 0.1 * 4 * 2, -0.1 * 4, 2, 0])
    assert delta.item() == 1 and not delta.requires_grad
    assert all(parameter.grad is None for parameter in (shared, of_inner, of_outer, of_none))


def test_the_published_convention_of_zskt_is_a_choice_of_weights(student):
    """ZSKT also averages over C classes: its KL / C, lambda, eta are our weight 1 / C, C lambda, eta / C."""
    ours = Retrospection(temperature=1.0, weight=0.25, penalty=0.004, eta=0.025, portion=1.0)
    published = Retrospection(temperature=0.5, penalty=0.001, eta=0.1, portion=1.0)  # T^2 = 1 / 4 for 4 classes

    class Doubled(nn.Module):  # logits times T, so that T divides nothing
        def __init__(self):
            super().__init__()
            self.network = student

        def forward(self, images):
            return self.network(images) / 2

    delta = 0.3 * torch.randn(1, 3, 16, 16, generator=random())
    found = ours.gradient(student, IMAGES, delta, random())
    expected = published.gradient(Doubled(), IMAGES, delta, random())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.weight * a, b, rtol=1e-4, atol=1e-7)


def change(network, delta, training=False):
    """Divergence between outputs for perturbed and clean images."""
    network.train(training)
    with torch.no_grad():
        return kl_divergence(network(IMAGES), network(IMAGES + delta), temperature=1.0).item()


def test_the_perturbation_changes_outputs_far_more_than_its_initial_noise(student, teacher):
    step = Retrospection(temperature=1.0, rounds=10)
    _, record = step.accumulate(student, teacher, IMAGES, random())
    delta = step.perturbation(teacher, IMAGES, random())[0]
    assert delta.shape == (1, 3, 16, 16) and not delta.requires_grad
    assert record["kl_after"] > 10 * record["kl_before"] > 0
    assert record["kl_after"].item() == pytest.approx(change(teacher, delta), rel=1e-5)
    assert record["delta_norm"] == delta.norm()


def test_without_rounds_the_perturbation_is_noise_of_the_given_size(teacher):
    delta = Retrospection(temperature=1.0, rounds=0, start=0.01).perturbation(teacher, IMAGES, random())[0]
    assert delta.std().item() == pytest.approx(0.01, rel=0.15)


def test_a_first_round_from_zero_has_no_direction_and_from_noise_it_has(teacher):
    """The divergence is minimal at delta = 0, so the direction of Adam's step is only rounding."""
    def gradient_from(start):
        noise = torch.randn(1, *IMAGES.shape[1:], generator=random())
        delta = (start * noise).requires_grad_()
        kl = kl_divergence(teacher(IMAGES).detach(), teacher(IMAGES + delta), temperature=1.0)
        return torch.autograd.grad(kl, delta)[0].norm().item()

    assert 1000 * gradient_from(0) < gradient_from(0.01)


def test_each_round_moves_a_pixel_by_the_learning_rate_at_most_and_a_radius_bounds_the_norm(teacher):
    free = Retrospection(temperature=1.0, rounds=5, start=0.0).perturbation(teacher, IMAGES, random())[0]
    assert 0.1 < free.abs().max() <= 0.5 + 1e-5
    bounded = Retrospection(temperature=1.0, rounds=5, radius=0.7).perturbation(teacher, IMAGES, random())[0]
    assert free.norm() > 1
    assert bounded.norm().item() == pytest.approx(0.7, rel=1e-5)


def test_a_heavy_penalty_keeps_the_perturbation_small(teacher):
    light, heavy = (Retrospection(temperature=1.0, rounds=20, penalty=penalty) for penalty in (0.0, 10.0))
    norm = {step: step.perturbation(teacher, IMAGES, random())[0].norm() for step in (light, heavy)}
    assert norm[heavy] < 0.5 * norm[light]


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("detach_clean", [True, False])
def test_a_step_makes_the_student_change_less_under_the_same_perturbation(student, teacher, batch_norm, detach_clean):
    step = Retrospection(temperature=1.0, portion=1.0, batch_norm=batch_norm, detach_clean=detach_clean)
    delta = step.perturbation(student, IMAGES, random())[0]
    before = change(student, delta, batch_norm == "train")
    gradients = step.gradient(student, IMAGES, delta, random())
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            parameter -= 0.02 * gradient / norm
    assert change(student, delta, batch_norm == "train") < before


def test_with_one_fixed_point_step_and_no_eta_the_hypergradient_is_the_plain_gradient(student):
    step = Retrospection(temperature=4.0, steps=1, eta=0.0, portion=1.0)
    delta = 0.3 * torch.randn(1, 3, 16, 16, generator=random())
    student.eval()
    with torch.no_grad():
        clean = student(IMAGES)
    loss = 16 * kl_divergence(clean, student(IMAGES + delta), temperature=4.0)
    expected = torch.autograd.grad(loss, list(student.parameters()))
    for gradient, plain in zip(step.gradient(student, IMAGES, delta, random()), expected, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("portion", "count"), [(0.02, 1), (0.25, 2), (1.0, 8)])
def test_the_outer_objective_perturbs_a_portion_of_the_batch_and_at_least_one_image(student, portion, count):
    step = Retrospection(temperature=1.0, portion=portion)
    seen = []
    student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    step.gradient(student, IMAGES, torch.ones(1, 3, 16, 16), random())
    clean, inner, outer = seen
    assert torch.equal(clean, IMAGES) and torch.equal(inner, IMAGES + 1)
    assert (outer != IMAGES).flatten(1).any(1).sum() == count
    assert ((outer == IMAGES) | (outer == IMAGES + 1)).all()


def test_the_weighted_hypergradient_is_added_to_the_gradients_that_are_there(student, teacher):
    once = copy.deepcopy(student)
    Retrospection(temperature=1.0).accumulate(once, teacher, IMAGES, random())
    nn.utils.parameters_to_vector(student.parameters()).sum().backward()
    step = Retrospection(temperature=1.0, weight=3.0)
    _, record = step.accumulate(student, teacher, IMAGES, random())
    for parameter, plain in zip(student.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 1 + 3 * plain.grad)
    norm = math.sqrt(sum(plain.grad.square().sum().item() for plain in once.parameters()))
    assert record["hypergradient_norm"].item() == pytest.approx(norm, rel=1e-4)
    assert all(value.isfinite() and value.shape == () and not value.requires_grad for value in record.values())


def test_the_source_gets_no_gradient_and_a_frozen_parameter_of_the_student_none_either(student, teacher):
    student.conv1.weight.requires_grad_(False)
    Retrospection(temperature=1.0).accumulate(student, teacher, IMAGES, random())
    assert student.conv1.weight.grad is None and student.fc.weight.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("of_student", [True, False])
def test_frozen_batch_norm_changes_no_statistic_and_no_mode(student, teacher, of_student):
    student.group2.eval()  # its own mode, which must be restored
    modes = [module.training for module in student.modules()]
    before = statistics(student)
    Retrospection(temperature=1.0, batch_norm="frozen").accumulate(student, student if of_student else teacher,
                                                                   IMAGES, random())
    assert not changed(student, before)
    assert [module.training for module in student.modules()] == modes


def test_in_train_mode_perturbed_images_only_enter_the_students_statistics(student, teacher):
    of_student, of_teacher = statistics(student), statistics(teacher)
    Retrospection(temperature=1.0, batch_norm="train").accumulate(student, teacher, IMAGES, random())
    assert changed(student, of_student) and not changed(teacher, of_teacher)


class SeenInputs(nn.Module):
    """A batch norm and a linear layer, and a list of the inputs in train mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.seen = nn.BatchNorm2d(3), nn.Linear(3 * 16 * 16, 4), []

    def forward(self, images):
        if self.training:
            self.seen.append(images.detach().clone())
        return self.linear(self.norm(images).flatten(1))


def step(student, source, **settings):
    """One step of distillation with retrospection: a clean pass, then the hypergradient. Returns delta."""
    student(IMAGES).square().mean().backward()
    return Retrospection(temperature=1.0, rounds=2, **settings).accumulate(student, source, IMAGES, random())[0]


@pytest.mark.parametrize("detach_clean", [True, False])
def test_in_train_mode_the_student_sees_the_published_sequence_of_inputs(teacher, detach_clean):
    student = SeenInputs()
    delta = step(student, teacher, batch_norm="train", detach_clean=detach_clean)
    *clean, inner_clean, inner, outer_clean, outer = student.seen
    assert len(clean) == 2  # of distillation and of retrospection
    assert all(torch.equal(images, IMAGES) for images in (*clean, inner_clean, outer_clean))
    assert torch.equal(inner, IMAGES + delta)
    assert (outer != IMAGES).flatten(1).any(1).sum() == 1


def test_with_frozen_batch_norm_retrospection_makes_no_pass_in_train_mode_and_no_repeated_one(teacher):
    student, passes = SeenInputs(), []
    student.register_forward_pre_hook(lambda *_: passes.append(student.training))
    step(student, teacher, batch_norm="frozen")
    assert passes == [True, False, False, False]  # distillation, then x, x + delta and x'


def test_modes_are_restored_after_an_error(student):
    with pytest.raises(RuntimeError):
        Retrospection(temperature=1.0).perturbation(student, torch.zeros(2, 5, 16, 16), random())
    assert student.training


def test_a_seed_gives_the_same_step_bit_for_bit_and_another_seed_another(student, teacher):
    def gradients(*seed):
        model = copy.deepcopy(student)
        Retrospection(temperature=1.0).accumulate(model, teacher, IMAGES, seeds.generator(*seed))
        return [parameter.grad for parameter in model.parameters()]

    first, again, other = gradients(1), gradients(1), gradients(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_unknown_treatment_of_batch_norm_is_an_error():
    with pytest.raises(ValueError, match="'frozen' or 'train', not 'off'"):
        Retrospection(temperature=1.0, batch_norm="off")
