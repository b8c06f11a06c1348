"""Attacks of a thief who knows the answer defense and undoes it."""
import pytest
import torch
from conftest import refused, results
from test_queries import student  # noqa: F401
from torch import nn

from attacks import build_attack
from attacks.recovering import draw_answers
from defenses.answers import Answers
from utils.data import Batch

SMALL = {"bayes": {"pairs": 20_000}, "ddae_plus": {"pairs": 5000, "recovery_epochs": 30}}


def answers(count=200, classes=4):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0)).log_softmax(1)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("defense", ["temperature:3", "reverse_sigmoid:0.5"])
def test_recovered_answers_are_closer_to_the_clean_ones_than_observed_answers(name, defense):
    clean, defend = answers(), Answers("probabilities", defense)
    attack = build_attack(name, 4, **SMALL[name])
    attack.learn_defense(defend, defend(clean))
    errors = [(each.exp() - clean.exp()).abs().sum(1).mean() for each in (attack.recovered, defend(clean))]
    torch.testing.assert_close(attack.recovered.exp().sum(1), torch.ones(200))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", SMALL)
def test_recovery_derives_from_its_seed_and_keeps_the_random_state(name):
    defend, found = Answers("probabilities", "temperature:3"), []
    for _ in range(2):
        attack = build_attack(name, 4, **SMALL[name])
        attack.seed = 7
        state = torch.get_rng_state()
        attack.learn_defense(defend, defend(answers()))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(attack.recovered)
    assert torch.equal(*found)


def test_sorted_classes_recover_the_top_class_that_a_defense_hides_in_a_margin():
    clean, defend = 3 * answers(classes=10), Answers("probabilities", "modelguard_w:1")
    kept = {}
    for sort_classes in (False, True):
        attack = build_attack("ddae_plus", 10, pairs=5000, recovery_epochs=40, sort_classes=sort_classes)
        attack.learn_defense(defend, defend(clean))
        kept[sort_classes] = (attack.recovered.argmax(1) == clean.argmax(1)).float().mean()
    assert kept[True] > 0.85 > 0.6 > kept[False]


def test_the_log_compares_recovered_answers_that_are_perturbed_again_with_the_observed():
    attack, defend = build_attack("bayes", 4, pairs=20_000), Answers("probabilities", "temperature:3")
    line = attack.learn_defense(defend, defend(answers()))
    distance = (defend(attack.recovered).exp() - defend(answers()).exp()).abs().sum(1).mean()
    assert line.startswith("recovered answers: 100.00 % keep the top class") and line.endswith(f"{distance:.3f}")


@pytest.mark.parametrize("name", SMALL)
def test_without_a_known_defense_the_attack_is_plain_distillation(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    batch = Batch(torch.randn(5, 3, 2, 2), None, torch.arange(5), torch.tensor(0.0))
    plain = build_attack("kd", 4, alpha=1.0, temperature=1.0)
    losses = [attack(network, batch, answers(5))["loss"] for attack in (build_attack(name, 4), plain)]
    assert torch.equal(*losses)


def test_recovered_answers_need_the_index_of_each_image():
    attack = build_attack("bayes", 4, pairs=1000)
    attack.recovered = answers()
    with pytest.raises(ValueError, match="the batch has no index"):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), Batch(torch.randn(5, 3, 2, 2)), answers(5))


def test_sampled_answers_scatter_around_the_observed_ones():
    observed = torch.tensor([[0.7, 0.2, 0.1]])
    torch.manual_seed(0)
    torch.testing.assert_close(draw_answers(observed, 20_000).mean(0), observed[0], atol=0.01, rtol=0)


def test_a_run_recovers_before_the_first_epoch_and_continues_bit_for_bit(student, call):  # noqa: F811
    params = {"attack": "ddae_plus", "pairs": 1000, "recovery_epochs": 2, "labels": 0, "queries": "once",
              "answer_defense": "mad:1", "interface": "probabilities"}
    whole = student(**params, num_epochs=2)
    assert call("train_kd", whole).returncode == 0
    assert (whole / "training.log").read_text().count("recovered answers: ") == 1
    parts = whole.rename(whole.with_name("whole")), student(**params, num_epochs=1)
    assert call("train_kd", parts[1]).returncode == 0
    assert call("train_kd", parts[1], "--set", "num_epochs=2").returncode == 0
    assert results(parts[0])["last"] == results(parts[1])["last"]


def test_an_attack_that_needs_all_answers_requires_queries_once(student, call):  # noqa: F811
    line = refused(call, "train_kd", student(attack="bayes", labels=0))
    assert 'set "queries" to "once"' in line
