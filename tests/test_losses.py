"""Losses: golden values and gradients, closed forms, and gradients with underflowing probabilities."""
import json
import math
from pathlib import Path

import pytest
import torch

from utils.losses import cross_entropy, kd_loss, kd_terms, kl_divergence, kl_per_sample, nasty_loss, nasty_terms

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
STUDENT, TEACHER = (torch.tensor(GOLDEN[key], dtype=torch.float64)
                    for key in ("student_or_nasty_logits", "teacher_or_adversary_logits"))
LABELS = torch.tensor(GOLDEN["labels"])


def golden(kind):
    """(temperature, alpha or weight, expected) of every golden case of a loss."""
    names = [name for name in GOLDEN if name.startswith(kind)]
    return [pytest.param(*(float(word.split("=")[1]) for word in name.split()[1:]), GOLDEN[name], id=name)
            for name in names]


@pytest.mark.parametrize("temperature, alpha, expected", golden("kd"))
def test_kd_loss_and_gradient_match_golden_values(temperature, alpha, expected):
    student = STUDENT.clone().requires_grad_()
    loss = kd_loss(student, TEACHER, LABELS, temperature=temperature, alpha=alpha)
    gradient, = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert gradient[0].tolist() == pytest.approx(expected["gradient_row_0"], rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("temperature, weight, expected", golden("nasty"))
def test_nasty_loss_terms_and_gradient_match_golden_values(temperature, weight, expected):
    nasty = STUDENT.clone().requires_grad_()
    terms = nasty_terms(nasty, TEACHER, LABELS, temperature=temperature, weight=weight)
    gradient, = torch.autograd.grad(terms["loss"], nasty)
    assert terms["cross_entropy"].item() == pytest.approx(expected["cross_entropy"], rel=1e-9)
    assert terms["kl"].item() == pytest.approx(expected["kl_times_T_squared"], rel=1e-9)
    assert terms["loss"].item() == pytest.approx(expected["loss_without_the_constant"], rel=1e-9)
    assert gradient[0].tolist() == pytest.approx(expected["gradient_row_0"], rel=1e-9, abs=1e-11)
    assert nasty_loss(nasty, TEACHER, LABELS, temperature=temperature, weight=weight).item() == terms["loss"].item()


def test_kl_divergence_of_two_classes_has_its_closed_form_in_both_directions():
    p, q = 0.8, 0.4
    of_p, of_q = (torch.tensor([[math.log(x), math.log(1 - x)]], dtype=torch.float64) for x in (p, q))
    forward = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    backward = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert kl_divergence(of_p, of_q, temperature=1.0).item() == pytest.approx(forward)
    assert kl_divergence(of_q, of_p, temperature=1.0).item() == pytest.approx(backward)
    assert kl_divergence(of_p, of_p, temperature=3.0).item() == pytest.approx(0)


def test_kd_measures_from_the_teacher_and_the_nasty_loss_from_the_nasty_network():
    """KD: KL(teacher || student); nasty: KL(nasty || adversary). Both carry T^2."""
    kd = kd_terms(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.9)
    nasty = nasty_terms(STUDENT, TEACHER, LABELS, temperature=4, weight=0.04)
    assert kd["kl"].item() == pytest.approx(16 * kl_divergence(TEACHER, STUDENT, temperature=4).item())
    assert nasty["kl"].item() == pytest.approx(16 * kl_divergence(STUDENT, TEACHER, temperature=4).item())


def test_at_high_temperature_the_kd_gradient_is_the_difference_of_centered_logits():
    """Hinton et al., eq. 4, with T^2 and batch mean: (z - v) / (C B) for zero-mean logits."""
    student = (STUDENT - STUDENT.mean(1, keepdim=True)).requires_grad_()
    teacher = TEACHER - TEACHER.mean(1, keepdim=True)
    gradient, = torch.autograd.grad(kd_loss(student, teacher, LABELS, temperature=1e4, alpha=1.0), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / student.numel(), rtol=1e-3, atol=1e-5)


def test_alpha_and_weight_of_zero_leave_the_cross_entropy():
    expected = cross_entropy(STUDENT, LABELS)
    assert torch.equal(kd_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.0), expected)
    assert torch.equal(nasty_loss(STUDENT, TEACHER, LABELS, temperature=4, weight=0.0), expected)


def test_a_step_against_the_nasty_gradient_drives_the_outputs_from_the_adversary():
    nasty = STUDENT.clone().requires_grad_()
    gradient, = torch.autograd.grad(nasty_loss(nasty, TEACHER, LABELS, temperature=4, weight=10.0), nasty)
    before, after = (kl_divergence(x, TEACHER, temperature=4).item() for x in (nasty, nasty - 0.1 * gradient))
    assert after > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_gradients_are_finite_for_logits_spread_over_a_thousand_temperatures(temperature, dtype):
    spread = 1000 * temperature * torch.tensor([[0.5, 0.0, -0.5], [-0.5, 0.5, 0.0]])
    labels = torch.tensor([0, 2])
    for one, other in ((spread, torch.zeros(2, 3)), (torch.zeros(2, 3), spread), (spread, -spread)):
        for loss in (lambda x, y: kd_loss(x, y, labels, temperature=temperature, alpha=0.9),
                     lambda x, y: nasty_loss(x, y, labels, temperature=temperature, weight=0.04)):
            trained = one.to(dtype).requires_grad_()
            value = loss(trained, other.to(dtype))
            gradient, = torch.autograd.grad(value, trained)
            assert value.isfinite()
            assert gradient.isfinite().all()


def test_the_value_is_exact_if_probabilities_underflow():
    """(200 T, 0, -300 T) against a uniform adversary: KL = log 3, and the loss is unmoved by 1e-3 of a T."""
    nasty = torch.tensor([[800.0, 0.0, -1200.0]], requires_grad=True)
    kl = kl_divergence(nasty, torch.zeros(1, 3), temperature=4.0)
    gradient, = torch.autograd.grad(kl, nasty)
    assert kl.item() == pytest.approx(math.log(3))
    assert gradient.abs().max() < 1e-6


def test_losses_are_float32_for_half_precision_logits_and_float64_stays():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):
        student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
        assert kd_loss(student, teacher, LABELS, temperature=4, alpha=0.9).dtype == expected
        assert nasty_loss(student, teacher, LABELS, temperature=4, weight=0.04).dtype == expected
        assert cross_entropy(student, LABELS).dtype == expected


@pytest.mark.parametrize("divergence", [kl_divergence, kl_per_sample])
def test_a_divergence_from_answers_with_zeros_is_finite_and_passes_gradients(divergence):
    student = torch.zeros(1, 3, requires_grad=True)
    value = divergence(torch.tensor([[0.0, -torch.inf, -torch.inf]]), student, temperature=1.0).sum()
    value.backward()
    assert value.item() == pytest.approx(math.log(3))
    assert student.grad.isfinite().all()
