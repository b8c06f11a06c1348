"""Answer defenses against their definitions: brute force, a linear program, and values computed by hand."""
import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.answer_defenses import linear_program
from defenses.answers import Answers, build_answer_defense
from defenses.perturbations import MARGIN, deviating_target

STRENGTHS = ["stingy:2", "temperature:3", "random:0.5", "reverse_sigmoid:0.21", "mad:0.5", "mad:2", "modelguard_w:1",
             "modelguard_w:0.2", "modelguard_s:1"]


def answers(count, classes, seed=0, scale=2.0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)).mul(scale).softmax(1)


@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("name", ["mad", "modelguard_w", "modelguard_s", "random"])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
def test_an_answer_moves_by_no_more_than_the_strength(name, epsilon, classes):
    before = answers(300, classes)
    after = build_answer_defense(f"{name}:{epsilon}")(before)
    assert (after - before).abs().sum(1).max() <= epsilon + 1e-5


@pytest.mark.parametrize("name", ["stingy:2", "temperature:3", "mad:1", "modelguard_w:1", "modelguard_s:1"])
def test_the_top_class_is_kept(name):
    before = answers(500, 10)
    assert torch.equal(build_answer_defense(name)(before).argmax(1), before.argmax(1))


@pytest.mark.parametrize("name", STRENGTHS)
def test_uniform_one_hot_and_tied_answers_stay_probabilities(name):
    before = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    after = build_answer_defense(name)(before)
    assert after.isfinite().all() and (after >= 0).all()
    torch.testing.assert_close(after.sum(1), torch.ones(4))


class TestStingy:
    @pytest.mark.parametrize("temperature", [1, 4, 20])
    def test_stingy_is_the_softmax_with_other_logits_at_minus_infinity(self, temperature):
        logits = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
        kept = logits.topk(2, dim=1).indices
        published = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept)) / temperature
        ours = Answers("probabilities", "stingy:2")(logits) / temperature
        torch.testing.assert_close(ours.softmax(1), published.softmax(1))


def test_temperature_is_that_of_the_logits():
    logits = 3 * torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(build_answer_defense("temperature:4")(logits.softmax(1)), (logits / 4).softmax(1))


class TestRandom:
    def test_half_of_the_strength_goes_to_one_class_that_is_not_the_top(self):
        before = answers(400, 6)
        rest = build_answer_defense("random:0.5")(before) - 0.75 * before
        moved = rest.argmax(1)
        torch.testing.assert_close(rest.gather(1, moved[:, None]), torch.full((400, 1), 0.25))
        assert (moved != before.argmax(1)).all()
        assert len(set(moved.tolist())) == 6

    def test_random_noise_derives_from_the_answer_only(self):
        before, defense = answers(50, 6), build_answer_defense("random:0.5")
        assert torch.equal(defense(before.flip(0)).flip(0), defense(before))


def test_reverse_sigmoid_by_hand():
    p, beta = [0.7, 0.2, 0.1], 0.3
    moved = [x - beta * (1 / (1 + (x / (1 - x)) ** -0.2) - 0.5) for x in p]
    after = build_answer_defense(f"reverse_sigmoid:{beta}")(torch.tensor([p]))
    assert after[0].tolist() == pytest.approx([x / sum(moved) for x in moved], rel=1e-5)


class TestMAD:
    @staticmethod
    def angle(target, y):
        """Squared distance between the unit vectors of q - target and q - y for a uniform q."""
        one, other = (1 / len(y) - each for each in (target, y))
        return np.square(one / np.linalg.norm(one) - other / np.linalg.norm(other)).sum()

    @pytest.mark.parametrize("classes", range(3, 9))
    def test_no_uniform_set_with_the_top_class_turns_the_gradient_further(self, classes):
        for y in answers(40, classes, seed=classes).double().numpy():
            top, found = y.argmax(), deviating_target(torch.tensor(y)[None])[0].numpy()
            others = [c for c in range(classes) if c != top]
            best = max(self.angle(target, y) for size in range(classes - 1)
                       for target in (self.uniform(chosen, top, classes)
                                      for chosen in itertools.combinations(others, size)))
            assert self.angle(found, y) == pytest.approx(best, abs=1e-3)  # the published 1e-5 on the top class

    @staticmethod
    def uniform(chosen, top, classes):
        target = np.zeros(classes)
        target[[*chosen, top]] = 1
        target[top] += 1e-5
        return target / target.sum()

    def test_the_published_example(self):
        y = torch.tensor([[0.90, 0.05, 0.02, 0.01, 0.005, 0.005, 0.004, 0.003, 0.002, 0.001]])
        after = build_answer_defense("mad:1")(y)[0]
        assert after[0] == pytest.approx(0.43, abs=0.005)
        assert after[1] == after.min() == pytest.approx(0.02, abs=0.005)  # of all but the runner-up
        assert after[2:].mean() == pytest.approx(0.07, abs=0.005)


class TestModelGuardW:
    def test_has_the_cost_of_the_linear_program(self):
        """200 random cases, within 1e-6 of the least cost."""
        random, worst = np.random.default_rng(0), 0.0
        for _ in range(200):
            classes, epsilon = int(random.integers(3, 21)), float(random.uniform(0.05, 1.5))
            y = random.dirichlet(np.full(classes, random.choice([0.05, 0.3, 1.0, 5.0])))
            program = linear_program(y, epsilon)
            after = build_answer_defense(f"modelguard_w:{epsilon}")(torch.tensor(y)[None])[0].numpy()
            assert after.sum() == pytest.approx(1) and after.min() >= 0
            if program.status != 0:  # no room for the margin
                assert after == pytest.approx(y)
                continue
            assert np.abs(after - y).sum() <= epsilon + 1e-8
            assert after[y.argmax()] >= np.delete(after, y.argmax()).max() + MARGIN - 1e-9
            worst = max(worst, abs((np.log(y + 1e-6) * after).sum() - program.fun))
        assert worst < 1e-6

    def test_the_published_examples(self):
        after = build_answer_defense("modelguard_w:1")(torch.tensor([[0.9, 0.05, 0.03, 0.015, 0.005]]))
        torch.testing.assert_close(after, torch.tensor([[0.40, 0.05, 0.03, 0.12, 0.40]]), atol=2e-4, rtol=0)
        peaks = build_answer_defense("modelguard_w:1")(torch.tensor([[0.99] + [0.01 / 9] * 9])).topk(2).values
        torch.testing.assert_close(peaks, torch.tensor([[0.49, 0.49]]), atol=2e-4, rtol=0)


class TestModelGuardS:
    def test_each_answer_is_the_first_centroid_that_is_near_or_becomes_one(self):
        y = answers(300, 4, scale=1.0)
        centroids, expected = {}, []
        for row in y:
            known = centroids.setdefault(int(row.argmax()), [])
            near = next((each for each in known if (each - row).abs().sum() <= 0.4), None)
            if near is None:
                known.append(row)
            expected.append(row if near is None else near)
        assert torch.equal(build_answer_defense("modelguard_s:0.4")(y), torch.stack(expected))


@pytest.mark.parametrize("text", ["stingy", "stingy:0", "stingy:1.5", "mad:0", "mad:2.1", "mad:x", "random", "mad:nan",
                                  "temperature:-1", "reverse_sigmoid:", "modelguard_w:inf"])
def test_a_strength_out_of_range_is_refused(text):
    with pytest.raises(ValueError, match=r"takes a (whole )?number"):
        build_answer_defense(text)


def test_the_largest_strength_is_allowed():
    assert math.isclose(float(build_answer_defense("mad:2")(answers(1, 5)).sum()), 1, rel_tol=1e-5)
