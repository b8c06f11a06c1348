"""Losses of the attacks: values computed by hand, and limit cases."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attacks
from attacks import build_attack
from attacks.base import WeightedParams
from attacks.dist import correlation
from attacks.jsd import jensen_shannon
from attacks.logit_standardization import z_scores
from attacks.swap import swap_top
from runs.stages import KD
from utils.data import Batch

LN2 = math.log(2)


def batch_of(labels):
    count = len(labels) if labels is not None else 1
    return Batch(torch.zeros(count, 3, 8, 8), labels if labels is None else torch.tensor(labels), torch.arange(count),
                 torch.tensor(30.0))


def terms_of(name, student, teacher, labels, **parameters):
    """Terms of an attack for lists of probabilities (B, C) of student and teacher."""
    logits, answers = torch.tensor(student).log(), torch.tensor(teacher).log()
    return build_attack(name, logits.shape[1], **parameters)(lambda _: logits, batch_of(labels), answers)


def random_logits(count, classes, seed):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def powered(p, temperature):
    """A list of probabilities at temperature T: their power 1 / T, normalized."""
    values = np.array(p) ** (1 / temperature)
    return values / values.sum()


def kl(p, q):
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))


P, Q = [0.5, 0.3, 0.2], [0.25, 0.25, 0.5]  # teacher and student


class TestHardLabel:
    def test_loss_is_the_cross_entropy_with_the_top_class(self):
        terms = terms_of("hard_label", [Q], [P], None)
        assert terms["loss"].item() == pytest.approx(math.log(4))

    def test_alpha_weighs_the_top_class_against_the_label(self):
        terms = terms_of("hard_label", [Q], [P], [2], alpha=0.75)
        assert terms["loss"].item() == pytest.approx(0.75 * math.log(4) + 0.25 * LN2)

    def test_a_tie_is_the_lowest_class(self):
        assert terms_of("hard_label", [Q], [[0.2, 0.4, 0.4]], None)["loss"].item() == pytest.approx(math.log(4))
        assert terms_of("hard_label", [Q], [[0.0, 0.5, 0.5]], None)["loss"].item() == pytest.approx(math.log(4))

    def test_the_label_interface_gives_the_same_loss(self):
        logits, answers = random_logits(5, 4, 0), random_logits(5, 4, 1)
        one_hot = F.one_hot(answers.argmax(1), 4).float().log()
        attack = build_attack("hard_label", 4)
        losses = [attack(lambda _: logits, batch_of(None), each)["loss"] for each in (answers, one_hot)]
        assert losses[0] == losses[1]


class TestHTC:
    def test_only_the_teacher_is_tempered_and_no_temperature_is_squared(self):
        terms = terms_of("htc", [Q], [P], [0], temperature=2.0)
        assert terms["kl"].item() == pytest.approx(kl(powered(P, 2), Q), rel=1e-5)
        assert terms["loss"].item() == pytest.approx(0.9 * kl(powered(P, 2), Q) + 0.1 * math.log(4), rel=1e-5)

    @pytest.mark.parametrize("temperature", [50.0, 500.0])
    def test_a_high_temperature_is_label_smoothing_with_a_small_tilt(self, temperature):
        logits, answers, labels = random_logits(6, 10, 0), random_logits(6, 10, 1), torch.arange(6)
        attack = build_attack("htc", 10, temperature=temperature)
        loss = attack(lambda _: logits, batch_of(labels.tolist()), answers)["loss"]
        smoothed = F.cross_entropy(logits, labels, label_smoothing=0.9) - 0.9 * math.log(10)
        tilt = (answers - answers.mean(1, keepdim=True)) / (10 * temperature)
        first_order = smoothed - 0.9 * (tilt * logits.log_softmax(1)).sum(1).mean()
        assert loss.item() == pytest.approx(smoothed.item(), abs=2.5 / temperature)
        assert loss.item() == pytest.approx(first_order.item(), abs=5 / temperature**2)

    def test_the_matched_form_has_the_published_ratio_of_its_terms(self):
        terms = terms_of("htc_matched", [Q], [P], [0])
        term = 50**2 * kl(powered(P, 50), powered(Q, 50))
        assert terms["kl"].item() == pytest.approx(term, rel=1e-3)
        assert 1.9 * terms["loss"].item() == pytest.approx(math.log(4) + 0.9 * term, rel=1e-3)

    def test_the_matched_form_becomes_the_squared_distance_of_centered_logits(self):
        logits, answers = random_logits(6, 5, 0), random_logits(6, 5, 1)
        attack = build_attack("htc_matched", 5, temperature=1e4, alpha=1.0).double()
        loss = attack(lambda _: logits.double(), batch_of(None), answers.double())["loss"]
        difference = (answers - logits) - (answers - logits).mean(1, keepdim=True)
        assert loss.item() == pytest.approx((difference.square().sum(1).mean() / 10).item(), rel=1e-2)


class TestDivergences:
    def test_reverse_kl_is_from_the_student_to_the_teacher(self):
        terms = terms_of("reverse_kl", [Q], [P], [2], temperature=2.0)
        term = 4 * kl(powered(Q, 2), powered(P, 2))
        assert terms["loss"].item() == pytest.approx(0.9 * term + 0.1 * LN2, rel=1e-5)

    def test_reverse_kl_counts_zeros_as_one_millionth_before_the_temperature(self):
        terms = terms_of("reverse_kl", [[0.5, 0.5]], [[1.0, 0.0]], None, temperature=2.0, alpha=1.0)
        target = powered([1, 1e-6], 2)  # the row's sum drops out
        assert terms["loss"].item() == pytest.approx(4 * kl([0.5, 0.5], target), rel=1e-5)

    def test_jsd_is_the_mean_divergence_from_the_mixture(self):
        terms = terms_of("jsd", [Q], [P], [2], temperature=2.0)
        p, q = powered(P, 2), powered(Q, 2)
        term = 4 * (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
        assert terms["loss"].item() == pytest.approx(0.9 * term + 0.1 * LN2, rel=1e-5)

    def test_jsd_needs_no_floor_and_is_at_most_log_2(self):
        zeros = torch.tensor([[1.0, 0.0, 0.0]]).log()
        half = torch.tensor([[0.5, 0.25, 0.25]])
        expected = (kl([1], [0.75]) + kl([0.5, 0.25, 0.25], [0.75, 0.125, 0.125])) / 2
        assert jensen_shannon(zeros, half.log()).item() == pytest.approx(expected)
        apart = torch.tensor([[-200.0, 0.0, -200.0]], requires_grad=True)
        value = jensen_shannon(zeros, apart.log_softmax(1))
        value.backward()
        assert value.item() == pytest.approx(LN2)
        assert apart.grad.isfinite().all()

    def test_jsd_of_close_distributions_is_a_quarter_of_the_kl(self):
        near = [0.51, 0.295, 0.195]
        jsd = terms_of("jsd", [near], [P], None, temperature=1.0, alpha=1.0)["loss"].item()
        assert jsd == pytest.approx(kl(P, near) / 4, rel=0.02)


class TestDIST:
    def test_two_images_match_values_computed_by_hand(self):
        # Columns of two images correlate by 1 or -1: those of classes 0 and 1 by -1, that of class 2 by 1.
        teacher, student = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], [[0.4, 0.2, 0.4], [0.1, 0.3, 0.6]]
        rows = np.mean([np.corrcoef(t, s)[0, 1] for t, s in zip(teacher, student, strict=True)])
        terms = terms_of("dist", student, teacher, [0, 1], inter_weight=2.0, intra_weight=3.0)
        ce = -(math.log(0.4) + math.log(0.3)) / 2
        assert terms["inter"].item() == pytest.approx(1 - rows, rel=1e-5)
        assert terms["intra"].item() == pytest.approx(1 + 1 / 3, rel=1e-5)
        assert 2 * terms["loss"].item() == pytest.approx(ce + 2 * (1 - rows) + 3 * (4 / 3), rel=1e-5)

    def test_the_temperature_softens_outputs_and_enters_squared(self):
        terms = terms_of("dist", [Q, P], [P, P], [0, 1], temperature=2.0)
        row = np.corrcoef(powered(P, 2), powered(Q, 2))[0, 1]
        assert terms["inter"].item() == pytest.approx(4 * (1 - (row + 1) / 2), rel=1e-5)

    def test_equal_outputs_have_zero_loss(self):
        logits = random_logits(6, 5, 0)
        terms = build_attack("dist", 5)(lambda _: logits, batch_of([0, 1, 2, 3, 4, 0]), logits + 7)
        assert terms["dist"].item() == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("level", [0.0, 1e-3, 0.1, 1 / 3, 0.9])
    def test_constant_values_count_as_uncorrelated_with_a_finite_gradient(self, dim, level):
        constant = torch.full((7, 7), level, requires_grad=True)
        values = random_logits(7, 7, 0).softmax(dim).requires_grad_()
        found = correlation(values, constant, dim)
        found.sum().backward()
        assert torch.equal(found, torch.zeros(7))
        assert not values.grad.any() and not constant.grad.any()

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
    def test_small_values_correlate_like_large_ones(self, scale):
        a, b = random_logits(1, 8, 0).softmax(1), random_logits(1, 8, 1).softmax(1)
        expected = np.corrcoef(a.numpy(), b.numpy())[0, 1]
        assert correlation(scale * a, b, 1).item() == pytest.approx(expected, rel=1e-4)


class TestLogitStandardization:
    @pytest.mark.parametrize(("classes", "z", "top"), [(10, 2.85, 0.35), (100, 9.9, 0.60), (200, 14.1, 0.86)])
    def test_a_one_hot_answer_is_softened_by_the_number_of_classes_only(self, classes, z, top):
        logits = torch.zeros(1, classes)
        logits[0, 3] = 12.0
        scores = z_scores(logits)
        assert scores[0, 3].item() == pytest.approx((classes - 1) / math.sqrt(classes), rel=1e-5)
        assert scores[0, 3].item() == pytest.approx(z, abs=0.05)
        assert (scores / 2).softmax(1)[0, 3].item() == pytest.approx(top, abs=0.006)

    def test_the_default_is_the_published_loss(self):
        teacher, student = [1.0, 3.0, 8.0], [0.0, 2.0, 1.0]
        p, q = (np.exp((np.array(each) - np.mean(each)) / np.std(each, ddof=1) / 2) for each in (teacher, student))
        term = kl(p / p.sum(), q / q.sum())
        logits = torch.tensor([student])
        attack = build_attack("logit_standardization", 3)
        loss = attack(lambda _: logits, batch_of([1]), torch.tensor([teacher]))["loss"]
        ce = F.cross_entropy(logits, torch.tensor([1])).item()
        assert loss.item() == pytest.approx(0.1 * ce + 9 * 4 * term, rel=1e-5)

    def test_the_loss_ignores_the_scale_of_the_answers(self):
        logits, answers = random_logits(4, 5, 0), random_logits(4, 5, 1)
        attack = build_attack("logit_standardization", 5)
        losses = [attack(lambda _: logits, batch_of([0, 1, 2, 3]), each)["kl"] for each in (answers, 3 * answers + 2)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)

    def test_constant_logits_have_a_finite_gradient(self):
        logits = torch.zeros(1, 4, requires_grad=True)
        attack = build_attack("logit_standardization", 4)
        attack(lambda _: logits, batch_of([0]), random_logits(1, 4, 0))["loss"].backward()
        assert logits.grad.isfinite().all()


class TestCorrectionByLabels:
    def test_swap_exchanges_a_wrong_top_class_with_the_label(self):
        answers = torch.tensor([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [0.0, -torch.inf, -torch.inf]])
        swapped = swap_top(answers, torch.tensor([2, 1, 1]))
        assert swapped.tolist() == [[1.0, 3.0, 5.0], [1.0, 5.0, 3.0], [-torch.inf, 0.0, -torch.inf]]

    def test_swap_is_kd_of_the_exchanged_answers(self):
        wrong = terms_of("swap", [Q], [P], [2], temperature=2.0)
        term = 4 * kl(powered([0.2, 0.3, 0.5], 2), powered(Q, 2))
        assert wrong["loss"].item() == pytest.approx(0.9 * term + 0.1 * LN2, rel=1e-5)

    def test_consensus_is_kd_on_the_images_that_the_teacher_gets_right(self):
        rows = ([Q, [0.1, 0.2, 0.7], P], [P, P, P])
        terms, kept = (terms_of(name, *each, temperature=2.0) for name, each in (
            ("consensus", (*rows, [0, 1, 0])), ("kd", ([Q, P], [P, P], [0, 0]))))
        for name in ("loss", "kl", "cross_entropy"):
            torch.testing.assert_close(terms[name], kept[name])
        assert terms["agreed"].item() == pytest.approx(2 / 3)

    def test_consensus_without_an_agreed_image_is_zero(self):
        logits = random_logits(3, 4, 0).requires_grad_()
        answers = F.one_hot(torch.tensor([1, 2, 3]), 4).float().log()
        terms = build_attack("consensus", 4)(lambda _: logits, batch_of([0, 0, 0]), answers)
        terms["loss"].backward()
        assert terms["loss"] == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", ["smoothing", "scm_chain", "htc_matched"])
def test_loss_is_kd_with_other_defaults(name):
    logits, answers = random_logits(4, 5, 0), random_logits(4, 5, 1)
    attack = build_attack(name, 5)
    plain = build_attack("kd", 5, alpha=attack.params.alpha, temperature=attack.params.temperature)
    losses = [each(lambda _: logits, batch_of([0, 1, 2, 3]), answers)["loss"] for each in (attack, plain)]
    assert losses[0] == losses[1]


def test_smoothing_requests_several_views_of_an_image():
    assert build_attack("smoothing", 5).params.views == 3
    assert build_attack("smoothing", 5, num_views=2).params.views == 2
    with pytest.raises(ValueError, match="num_views"):
        build_attack("smoothing", 5, num_views=1)


@pytest.mark.parametrize(("name", "cifar10", "cifar100"), [
    ("kd", 4, 20), ("htc", 50, 70), ("htc_matched", 50, 70), ("reverse_kl", 4, 20), ("jsd", 4, 20), ("swap", 4, 20),
    ("consensus", 4, 20), ("scm_chain", 4, 4), ("smoothing", 1, 1), ("logit_standardization", 2, 2), ("dist", 1, 1)])
def test_each_data_set_has_the_published_temperature(name, cifar10, cifar100):
    run = {"model_name": "cnn", "learning_rate": 0.1, "num_epochs": 1, "teacher_model": "cnn", "teacher_resume": "x"}
    kind = KD.params_by(name)
    found = [kind(dataset=dataset, **run).temperature for dataset in ("cifar10", "cifar100")]
    assert found == [cifar10, cifar100]


@pytest.mark.parametrize("name", attacks.ATTACK_NAMES)
class TestEveryAttack:
    @staticmethod
    def loss(name, answers, labels=None, **parameters):
        """The loss of an attack and a student, both built from the same seed, and the attack."""
        torch.manual_seed(0)
        student, attack = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), build_attack(name, 5, **parameters)
        images = random_logits(6, 12, 3).view(6, 3, 2, 2)
        return attack(student, batch_of(labels)._replace(images=images), answers)["loss"].item(), attack.params

    @staticmethod
    def without_weight_of_labels(name):
        return {"alpha": 1.0} if issubclass(attacks.REGISTRY[name].Params, WeightedParams) else {}

    def test_logits_and_log_probabilities_give_equal_losses(self, name):
        answers, labels = random_logits(6, 5, 1), [0, 1, 2, 3, 4, 0]
        losses = [self.loss(name, each, labels)[0] for each in (answers, answers.log_softmax(1), answers + 40)]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)

    def test_an_attack_that_needs_no_labels_works_without(self, name):
        own = self.without_weight_of_labels(name)
        if why := build_attack(name, 5, **own).params.needs_labels:
            pytest.skip(why)
        assert math.isfinite(self.loss(name, random_logits(6, 5, 1), **own)[0])

    def test_a_weight_of_labels_is_refused_for_a_batch_without(self, name):
        if not issubclass(attacks.REGISTRY[name].Params, WeightedParams):
            pytest.skip("no weighted sum")
        with pytest.raises(ValueError, match="no labels"):
            self.loss(name, random_logits(6, 5, 1), alpha=0.75)

    def test_a_loop_of_ones_own_needs_neither_index_nor_epoch(self, name):
        images, answers, labels = random_logits(6, 12, 3).view(6, 3, 2, 2), random_logits(6, 5, 1), torch.arange(6) % 5
        losses = []
        for batch in (Batch(images, labels), Batch(images, labels, torch.arange(6), torch.tensor(1e6))):
            torch.manual_seed(0)
            student, attack = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), build_attack(name, 5)
            losses.append(attack(student, batch, answers)["loss"])
        assert losses[0] == losses[1]

    def test_a_loss_that_reads_no_labels_does_not_depend_on_them(self, name):
        own = self.without_weight_of_labels(name)
        losses, params = zip(*(self.loss(name, random_logits(6, 5, 1), labels, **own)
                               for labels in ([0, 1, 2, 3, 4, 0], [4, 3, 3, 1, 0, 2])), strict=True)
        assert (losses[0] != losses[1]) == params[0].reads_labels

    def test_a_weight_for_labels_needs_labels(self, name):
        kind = attacks.REGISTRY[name].Params
        if not issubclass(kind, WeightedParams):
            pytest.skip("no weighted sum")
        assert "alpha" in kind(alpha=0.5).needs_labels or kind(alpha=1.0).needs_labels
        assert not kind(alpha=1.0).needs_labels or kind(alpha=1.0).reads_labels
        assert kind(alpha=0.5).needs_labels and kind(alpha=0.5).reads_labels


@pytest.mark.parametrize("name", ["swap", "consensus"])
def test_attacks_that_compare_answers_with_labels_refuse_a_batch_without(name):
    with pytest.raises(ValueError, match="no labels"):
        terms_of(name, [Q], [P], None, alpha=1.0)
