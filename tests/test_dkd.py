"""Decoupled knowledge distillation: terms computed by hand, and limit cases."""
import math

import pytest
import torch
import torch.nn.functional as F

from attacks import build_attack
from attacks.dkd import decoupled_kl
from utils.data import Batch
from utils.losses import kl_divergence


def test_terms_of_one_image_match_values_computed_by_hand():
    teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    target, other = decoupled_kl(teacher, student, torch.tensor([0]), temperature=1.0)
    assert target.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert other.item() == pytest.approx(0.6 * math.log(0.6 * 3) + 0.4 * math.log(0.4 * 3 / 2))


def test_plain_distillation_is_tckd_plus_the_teachers_non_target_mass_times_nckd():
    random = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(5, 7, generator=random), torch.randn(5, 7, generator=random)
    labels = torch.arange(5)
    for row in range(5):
        one = slice(row, row + 1)
        target, other = decoupled_kl(teacher[one], student[one], labels[one], temperature=1.0)
        rest = 1 - teacher[one].softmax(1)[0, labels[row]]
        assert (target + rest * other).item() == pytest.approx(
            kl_divergence(teacher[one], student[one], temperature=1.0).item(), rel=1e-4)


@pytest.mark.parametrize(("epoch", "weight"), [(0.0, 0.0), (5.0, 0.25), (20.0, 1.0), (30.0, 1.0)])
def test_the_weight_of_the_terms_rises_over_the_warm_up(epoch, weight):
    random = torch.Generator().manual_seed(1)
    logits, answers = torch.randn(4, 6, generator=random), torch.randn(4, 6, generator=random)
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.arange(4), torch.arange(4), torch.tensor(epoch))
    terms = build_attack("dkd", 6)(lambda _: logits, batch, answers)
    expected = F.cross_entropy(logits, batch.labels) + weight * (terms["tckd"] + 8 * terms["nckd"])
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_nckd_does_not_depend_on_the_probability_of_the_true_class(temperature):
    student = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    values = [decoupled_kl(torch.tensor([[top, 0.0, 1.0, 2.0, 3.0, 4.0]]), student, torch.tensor([0]),
                           temperature=temperature)[1].item() for top in (5.0, 20.0, 70.0)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_bfloat16_logits_are_divided_by_the_temperature_in_float32():
    random = torch.Generator().manual_seed(3)
    logits = [torch.randn(4, 5, generator=random).mul(9).bfloat16() for _ in range(2)]
    half = decoupled_kl(*logits, torch.arange(4), temperature=3.0)
    full = decoupled_kl(*(each.float() for each in logits), torch.arange(4), temperature=3.0)
    assert torch.equal(torch.stack(half), torch.stack(full))
