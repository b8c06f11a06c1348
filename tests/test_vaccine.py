"""Shuffling vaccine: permuted layers, suspicious samples, penalties, and selection of a shuffle."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from datafree.vaccine import (
    Selection,
    ShuffledTeacher,
    ascent_cap,
    divergence,
    generator_penalty,
    shufflable_convolutions,
    student_loss,
    suspicious,
    tail_ratio,
)
from model import build_model
from model.wideresnet import WideResNet
from utils.errors import UserError
from utils.losses import kl_per_sample

TEACHER = torch.diag(torch.full((3,), 3.0))
SHUFFLED = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])


def network(seed=0):
    torch.manual_seed(seed)
    return WideResNet(10, 1, 4)


def images(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def convolutions(model):
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_last_5_of_16_convolutions_of_wrn16_2_are_permuted():
    torch.manual_seed(0)
    teacher = build_model("wrn16_2", 10)
    names = shufflable_convolutions(teacher.eval())
    assert len(names) == 16
    assert names[-5:] == ["group3.0.conv1", "group3.0.conv2", "group3.0.shortcut", "group3.1.conv1", "group3.1.conv2"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    vaccine = ShuffledTeacher(teacher)
    assert len(vaccine.members) == 3
    for member in vaccine.members:
        for name, weight in convolutions(member).items():
            original = before[f"{name}.weight"]
            assert torch.equal(weight, original) == (name in names[:11])
            torch.testing.assert_close(weight.sum(1), original.sum(1))
            assert torch.equal(weight.abs().flatten(1).sort().values, original.abs().flatten(1).sort().values)
        others = {name for name in before if name.removesuffix(".weight") not in names}
        assert all(torch.equal(member.state_dict()[name], before[name]) for name in others)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_each_layer_and_each_member_has_its_own_permutation():
    vaccine = ShuffledTeacher(WideResNet(16, 1, 4), layers=4)
    drawn = [tuple(permutation.flatten().tolist()) for member in vaccine.permutations
             for permutation in member.values()]
    assert len(set(drawn)) == 3 * 4
    assert all(sorted(permutation) == list(range(len(permutation))) for permutation in drawn)


@pytest.mark.parametrize("name", ["net", "resnet18", "preresnet20", "densenet121", "resnext29", "shufflenetv2",
                                  "mobilenetv2", "wrn40_1"])
def test_convolutions_are_found_by_type_in_order_of_execution_and_leave_no_hook(name):
    model = build_model(name, 10).eval()
    found = shufflable_convolutions(model)
    expected = {name for name, weight in convolutions(model).items() if weight.shape[1] > 1}
    assert set(found) == expected and len(found) == len(expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_convolutions_are_ordered_by_execution_and_unused_ones_left_out():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            return self.last(self.first(self.first(x))).mean((2, 3))

    assert shufflable_convolutions(Backwards()) == ["first", "last"]


def test_a_grouped_convolution_is_permuted_within_its_groups_and_a_depthwise_one_does_not_count():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten())
    vaccine = ShuffledTeacher(teacher, layers=1)
    assert vaccine.layers == ["1"]
    weight, permutation = vaccine.members[0][1].weight, vaccine.permutations[0]["1"]
    assert permutation.shape == (2, 8)
    assert torch.equal(weight[:4], teacher[1].weight[:4][:, permutation[0]])
    assert torch.equal(weight[4:], teacher[1].weight[4:][:, permutation[1]])
    assert vaccine(images()).shape == (4, 8)


def test_the_ensemble_is_the_mean_of_its_members_logits_in_eval_mode_and_gradients_reach_the_images():
    teacher = network().train()
    vaccine, x = ShuffledTeacher(teacher), images().requires_grad_()
    logits = vaccine(x)
    torch.testing.assert_close(logits, sum(member(x) for member in vaccine.members) / 3)
    logits.sum().backward()
    assert x.grad.any()
    assert not any(module.training for member in vaccine.members for module in member.modules())
    assert not any(parameter.requires_grad for member in vaccine.members for parameter in member.parameters())
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())


def test_without_shuffled_layers_the_ensemble_equals_the_teacher():
    teacher = network().eval()
    with torch.no_grad():
        torch.testing.assert_close(ShuffledTeacher(teacher, layers=0)(images()), teacher(images()))


def test_a_seed_reproduces_the_ensemble_and_another_one_does_not():
    one, again, other = (ShuffledTeacher(network(), seed=seed) for seed in (5, 5, 6))
    assert all(same(a, b) for a, b in zip(one.members, again.members, strict=True))
    assert not same(one.members[0], other.members[0])


def test_shuffling_again_keeps_the_members_and_the_filters_sums_and_changes_the_weights():
    vaccine = ShuffledTeacher(network())
    members, before = list(vaccine.members), copy.deepcopy(vaccine.members[0])
    vaccine.shuffle()
    assert all(now is then for now, then in zip(vaccine.members, members, strict=True))
    for name in vaccine.layers:
        now, then = (model.get_submodule(name).weight for model in (vaccine.members[0], before))
        assert not torch.equal(now, then)
        torch.testing.assert_close(now.sum(1), then.sum(1))


def test_a_restored_vaccine_continues_like_the_saved_one(tmp_path):
    saved, restored = ShuffledTeacher(network(), seed=1), ShuffledTeacher(network(), seed=1)
    saved.shuffle()
    assert not same(saved.members[0], restored.members[0])
    torch.save(saved.state_dict(), tmp_path / "vaccine.tar")
    restored.load_state_dict(torch.load(tmp_path / "vaccine.tar", weights_only=True))
    assert all(same(a, b) for a, b in zip(saved.members, restored.members, strict=True))
    for vaccine in (saved, restored):
        vaccine.shuffle()
    assert all(same(a, b) for a, b in zip(saved.members, restored.members, strict=True))


def test_five_layers_are_shuffled_but_no_more_than_half():
    assert len(ShuffledTeacher(WideResNet(16, 1, 4)).layers) == 5  # of 15
    assert len(ShuffledTeacher(build_model("net", 4, num_channels=4)).layers) == 2  # of 3


def test_a_vaccine_of_other_layers_cannot_be_restored():
    state = ShuffledTeacher(network(), layers=3).state_dict()
    with pytest.raises(UserError, match="other layers or members"):
        ShuffledTeacher(network(), layers=4).load_state_dict(state)


def test_a_network_with_too_few_convolutions_is_a_user_error():
    with pytest.raises(UserError, match="last 10 convolutions of a teacher that has 9: choose fewer layers"):
        ShuffledTeacher(network(), layers=10)


def test_a_teacher_without_a_convolution_is_a_user_error():
    with pytest.raises(UserError, match="needs a teacher with a convolution"):
        ShuffledTeacher(build_model("mlp", 4))


def test_gray_images_have_one_channel():
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    vaccine = ShuffledTeacher(teacher, channels=1, image_size=16)
    assert vaccine.layers == ["1"] and vaccine(images()[:, :1]).shape == (4, 8)


def test_a_teacher_with_hooks_is_refused():
    teacher = network()
    teacher.bn.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="hooks"):
        ShuffledTeacher(teacher)


def test_mask_divergence_and_penalty_have_the_known_values():
    assert suspicious(TEACHER, SHUFFLED).tolist() == [True, False, True]
    assert divergence(TEACHER, SHUFFLED).tolist() == pytest.approx([0.0918, 0.3799, 0.0918], abs=5e-5)
    assert generator_penalty(TEACHER, SHUFFLED, coefficient=0.1).item() == pytest.approx(-0.00918026, abs=1e-8)


def test_the_penalty_without_a_suspicious_sample_is_zero_with_a_zero_gradient():
    teacher = TEACHER.clone().requires_grad_()
    penalty = generator_penalty(teacher, TEACHER.roll(1, dims=0), coefficient=0.1)
    gradient, = torch.autograd.grad(penalty, teacher)
    assert penalty.item() == 0 and not gradient.any()


def test_the_penalty_only_moves_suspicious_samples_through_both_networks():
    teacher, shuffled = TEACHER.clone().requires_grad_(), SHUFFLED.clone().requires_grad_()
    for gradient in torch.autograd.grad(generator_penalty(teacher, shuffled, coefficient=0.1), (teacher, shuffled)):
        assert gradient.any(1).tolist() == [True, False, True]


def test_a_step_of_the_images_against_the_penalty_makes_the_networks_disagree_more():
    teacher = network().eval()
    vaccine, x = ShuffledTeacher(teacher), images().requires_grad_()
    assert suspicious(teacher(x), vaccine(x)).any()
    before = generator_penalty(teacher(x), vaccine(x), coefficient=1.0)
    before.backward()
    moved = x.detach() - 1e-2 * x.grad / x.grad.norm()
    assert generator_penalty(teacher(moved), vaccine(moved), coefficient=1.0) < before


def test_the_penalty_of_extreme_logits_has_finite_gradients():
    teacher, shuffled = (torch.tensor([[1000.0, 0, -1000]], requires_grad=True),
                         torch.tensor([[10.0, 0, 3]], requires_grad=True))
    for gradient in torch.autograd.grad(generator_penalty(teacher, shuffled, coefficient=0.1), (teacher, shuffled)):
        assert gradient.isfinite().all()


def test_the_student_descends_on_clean_samples_and_ascends_on_suspicious_ones():
    kd = torch.tensor([1.0, 2, 3, 5], requires_grad=True)
    loss = student_loss(kd, torch.tensor([False, True, False, True]), coefficient=0.1, cap=100.0)
    assert loss.item() == pytest.approx((1 + 3) / 2 - 0.1 * (2 + 5) / 2)
    gradient, = torch.autograd.grad(loss, kd)
    assert gradient.tolist() == pytest.approx([0.5, -0.05, 0.5, -0.05])


def test_without_a_suspicious_sample_the_students_loss_is_the_plain_mean():
    assert student_loss(torch.tensor([1.0, 2, 6]), torch.zeros(3, dtype=torch.bool), coefficient=0.1, cap=1.0) == 3


def test_a_batch_of_only_suspicious_samples_has_a_finite_loss():
    loss = student_loss(torch.tensor([1.0, 3]), torch.ones(2, dtype=torch.bool), coefficient=0.1, cap=2.0)
    assert loss.item() == pytest.approx(-0.1 * (1 + 2) / 2)


@pytest.mark.parametrize("cap", [4.0, torch.tensor([1.0, 4.0])])
def test_past_the_cap_a_suspicious_sample_has_no_gradient(cap):
    kd = torch.tensor([3.0, 1e30], requires_grad=True)
    loss = student_loss(kd, torch.tensor([False, True]), coefficient=0.5, cap=cap)
    gradient, = torch.autograd.grad(loss, kd)
    assert loss.item() == 3 - 0.5 * 4 and gradient.tolist() == [1, 0]


def test_the_cap_is_the_divergence_of_a_uniform_prediction():
    logits = torch.tensor([[1000.0, 0, 0], [0, 0, 0]])
    assert ascent_cap(logits, temperature=2).tolist() == pytest.approx([4 * math.log(3), 0], abs=1e-6)
    torch.testing.assert_close(ascent_cap(TEACHER, temperature=4),
                               16 * kl_per_sample(TEACHER, torch.full((3, 3), 7.0), temperature=4))


def test_ascent_stops_only_with_a_cap():
    def student_after(cap):
        logits = torch.tensor([[2.0, 0, 0]], requires_grad=True)
        for _ in range(500):
            kd = kl_per_sample(TEACHER[:1], logits, temperature=1)
            gradient, = torch.autograd.grad(student_loss(kd, torch.tensor([True]), coefficient=1.0, cap=cap), logits)
            logits.data -= gradient
        return kl_per_sample(TEACHER[:1], logits, temperature=1).item()

    cap = ascent_cap(TEACHER[:1], temperature=1)
    assert cap.item() < student_after(cap) < 3 * cap.item()
    assert student_after(math.inf) > 100 * cap.item()


def known_divergences(tail):
    exponents = np.random.RandomState(0).normal(-1, 0.3, 970)
    return torch.from_numpy(10 ** np.concatenate([exponents, np.full(tail, -6.0)]))


def test_thirty_samples_far_below_a_thousand_are_a_tail_of_three_percent():
    assert tail_ratio(known_divergences(30)) == pytest.approx(0.03)
    assert tail_ratio(known_divergences(0)) <= 0.02


def test_zero_and_negative_divergences_count_like_tiny_ones():
    k = known_divergences(30)
    k[-30:-15], k[-15:] = 0, -1e-9
    assert tail_ratio(k) == pytest.approx(0.03)


def test_a_vaccine_with_a_tail_is_found_after_the_batches_that_count():
    selection = Selection(batches=5, skip=2)
    for _ in range(2):
        assert not selection.observe(torch.full((1000,), 1e9))  # an untrained generator's, which would hide the tail
    for part in known_divergences(30).split(334):
        assert not selection.found
        assert not selection.observe(part)
    assert selection.found and selection.finished
    assert selection.ratios == pytest.approx([0.03])


def test_a_refused_vaccine_is_shuffled_up_to_eight_tries_and_then_given_up():
    selection = Selection(batches=2, skip=1)
    verdicts = [selection.observe(known_divergences(0)) for _ in range(12)]
    assert verdicts == [False] + 7 * [True] + 4 * [False]
    assert selection.finished and not selection.found and len(selection.ratios) == 8


def test_with_a_fallback_the_best_of_the_refused_vaccines_is_used():
    selection = Selection(batches=1, skip=0, tries=3, fallback=True)
    verdicts = []
    for k in map(known_divergences, (0, 10, 5)):
        assert not selection.found
        verdicts.append((selection.observe(k), selection.number))
    assert verdicts == [(True, 1), (True, 2), (True, 1)]
    assert selection.ratios == pytest.approx([1 / 970, 10 / 980, 5 / 975])
    assert selection.found and selection.finished and not selection.accepted
    assert not selection.observe(known_divergences(0))


def test_a_shuffle_is_drawn_again_by_its_number():
    vaccine, drawn = ShuffledTeacher(network(), layers=4), []
    for _ in range(3):
        drawn.append(copy.deepcopy(vaccine.members[0]))
        vaccine.shuffle()
    vaccine.shuffle(1)
    assert [same(vaccine.members[0], member) for member in drawn] == [False, True, False]


def test_a_later_shuffle_only_uses_its_own_samples():
    selection = Selection(batches=1, skip=0)
    assert selection.observe(known_divergences(0))
    assert not selection.observe(known_divergences(30))
    assert selection.found


def test_a_selection_stores_no_graph():
    selection, k = Selection(), torch.ones(3, requires_grad=True)
    for _ in range(12):
        selection.observe(2 * k)
    collected = selection.state_dict()["collected"]
    assert len(collected) == 3 and not collected.requires_grad


def test_a_restored_selection_continues_like_the_saved_one(tmp_path):
    selection, restored = Selection(batches=3, skip=1), Selection(batches=3, skip=1)
    parts = [*known_divergences(0).split(97), *known_divergences(30).split(500)]
    for part in parts[:4]:
        selection.observe(part)
    torch.save(selection.state_dict(), tmp_path / "selection.tar")
    restored.load_state_dict(torch.load(tmp_path / "selection.tar", weights_only=True))
    verdicts = [[each.observe(part) for part in parts[4:]] for each in (selection, restored)]
    assert verdicts[0] == verdicts[1] and any(verdicts[0])
    assert selection.ratios == restored.ratios and len(selection.ratios) > 1


def test_a_selection_without_batches_is_an_error():
    with pytest.raises(ValueError, match="nothing to judge"):
        Selection(batches=11, skip=11)
