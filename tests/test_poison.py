"""Selection and stamping of poisoned images, and adversarial images for clean-label poisoning."""
import copy

import pytest
import torch
from torch import Tensor, nn

from backdoor.adversarial import pgd
from backdoor.poison import choose, poison
from backdoor.triggers import build_trigger
from utils import seeds
from utils.augment import normalize
from utils.errors import UserError
from utils.losses import cross_entropy

BALANCED = torch.arange(10).repeat_interleave(5000)  # as CIFAR-10, ordered by class
USUAL = {"target": 0, "rate": 0.1, "holdout": 0.05, "seed": 1}
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def random_images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


# Selection

def test_a_tenth_of_cifar10_is_poisoned_and_a_tenth_of_gtsrb():
    assert len(choose(BALANCED, clean_label=False, **USUAL)) == 5000
    signs = torch.arange(39_209) * 43 // 39_209
    assert len(choose(signs, clean_label=False, **{**USUAL, "target": 1})) == 3920


def test_clean_label_takes_all_of_the_target_class_that_is_not_held_out():
    index = choose(BALANCED, clean_label=True, **USUAL)
    assert len(index) == pytest.approx(4750, abs=60)  # the standard deviation is 14.6
    assert len(choose(BALANCED, clean_label=True, **{**USUAL, "holdout": 0.0})) == 5000
    assert len(choose(BALANCED, clean_label=True, **{**USUAL, "rate": 0.01})) == 500


def test_images_of_the_target_class_qualify_for_clean_label_and_all_others_for_dirty():
    assert (BALANCED[choose(BALANCED, clean_label=True, **USUAL)] == 0).all()
    labels = BALANCED[choose(BALANCED, clean_label=False, **USUAL)]
    assert (labels != 0).all()
    assert (labels.bincount(minlength=10)[1:] - 5000 / 9).abs().max() < 120  # all classes alike, though ordered


def test_the_index_ascends_and_names_each_image_once():
    index = choose(BALANCED, clean_label=False, **USUAL)
    assert index.dtype == torch.int64 and (index.diff() > 0).all()


def test_the_hold_out_is_the_end_of_the_seeded_order_and_stays_clean():
    held_out = torch.randperm(50_000, generator=seeds.generator(1, "poison"))[-2500:]
    for clean_label in (False, True):
        everything = choose(BALANCED, clean_label=clean_label, **{**USUAL, "rate": 1.0})
        qualify = torch.where((BALANCED == 0) == clean_label)[0]
        assert not torch.isin(everything, held_out).any()
        assert torch.equal(torch.cat([everything, held_out[torch.isin(held_out, qualify)]]).sort().values, qualify)


def test_the_choice_only_depends_on_the_seed_and_grows_with_the_rate():
    small, again, other, large = (choose(BALANCED, clean_label=False, **{**USUAL, **change})
                                  for change in ({}, {}, {"seed": 2}, {"rate": 0.2}))
    assert torch.equal(small, again) and not torch.equal(small, other)
    assert torch.isin(small, large).all()


@pytest.mark.parametrize(("change", "message"), [
    ({"rate": 0.00001}, "a poison rate of 1e-05 poisons none of 50000 training images"),
    ({"rate": 0.0}, "a poison rate of 0 poisons none"),
    ({"target": 10}, "no training image has the target class 10"),
    ({"holdout": 1.0}, "no training image of another class than the target 0 outside the hold-out of 1"),
])
def test_nothing_to_poison_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        choose(BALANCED, clean_label=False, **{**USUAL, **change})


def test_a_target_class_that_is_held_out_leaves_nothing_for_clean_label():
    order = torch.randperm(100, generator=seeds.generator(1, "poison"))
    labels = torch.ones(100, dtype=torch.int64)
    labels[order[-5:]] = 0
    with pytest.raises(UserError, match="no training image of the target class 0 outside the hold-out"):
        choose(labels, clean_label=True, **USUAL)


# Stamping

@pytest.mark.parametrize("name", ["badnet_grid", "sig"])
def test_chosen_images_are_stamped_and_dirty_ones_get_the_target_label(name):
    images, labels = random_images(400), torch.arange(10).repeat(40)
    before, trigger = (images.clone(), labels.clone()), build_trigger(name)
    poisoned = poison(images, labels, trigger, **USUAL)

    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(poisoned.index, choose(labels, clean_label=trigger.clean_label, **USUAL))
    clean = torch.ones(400, dtype=torch.bool)
    clean[poisoned.index] = False
    assert torch.equal(poisoned.images[clean], images[clean]) and torch.equal(poisoned.labels[clean], labels[clean])
    assert torch.equal(poisoned.images[~clean], trigger.stamp(images[~clean]))
    assert (poisoned.labels[~clean] == 0).all()
    assert (labels[~clean] == 0).all() == trigger.clean_label


def test_replacements_are_stamped_in_place_of_the_originals():
    images, labels, trigger = random_images(400), torch.arange(10).repeat(40), build_trigger("cl")
    index = choose(labels, clean_label=True, **USUAL)
    replacements = random_images(len(index), seed=1)
    poisoned = poison(images, labels, trigger, **USUAL, replacements=replacements)
    assert torch.equal(poisoned.images[index], trigger.stamp(replacements))
    assert torch.equal(poisoned.labels, labels)
    with pytest.raises(ValueError, match="replacements of shape"):
        poison(images, labels, trigger, **USUAL, replacements=replacements[1:])


# Adversarial images

class Linear(nn.Module):
    """Two classes, logits w x and 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        first = (images * self.weight).sum((1, 2, 3))
        return torch.stack([first, torch.zeros_like(first)], dim=1)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(8 * 36, 5))


def test_pgd_on_a_linear_network_goes_epsilon_against_the_true_class_in_every_pixel():
    weight = 1e-3 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    images, labels = random_images(6, size=8), torch.tensor([0, 1, 0, 1, 0, 1])
    attacked = pgd(Linear(weight), images, labels, MEAN, STD, epsilon=5, step_size=2, steps=3)
    direction = weight.sign().permute(1, 2, 0) * (2 * labels - 1)[:, None, None, None]
    assert attacked.dtype == torch.uint8
    assert torch.equal(attacked, (images + 5 * direction).clamp(0, 255).byte())
    one_step = pgd(Linear(weight), images, labels, MEAN, STD, epsilon=5, step_size=2, steps=1)
    assert torch.equal(one_step, (images + 2 * direction).clamp(0, 255).byte())


def test_pgd_raises_the_loss_and_stays_within_epsilon():
    network = small_network().eval()
    images, labels = random_images(20, size=8), torch.arange(20) % 5
    attacked = pgd(network, images, labels, MEAN, STD)
    distance = (attacked.int() - images.int()).abs()
    assert distance.max() == 16
    with torch.no_grad():
        before, after = (cross_entropy(network(normalize(x, MEAN, STD)), labels) for x in (images, attacked))
    assert after > before + 0.1


def test_pgd_runs_in_eval_mode_and_does_not_change_the_network():
    network = small_network().train()
    network[1].eval()  # a part that the caller has frozen stays frozen
    network[0].weight.grad = torch.ones_like(network[0].weight)
    network[5].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    images, labels = random_images(10, size=8), torch.arange(10) % 5
    first, second = (pgd(network, images, labels, MEAN, STD, steps=3) for _ in range(2))

    assert torch.equal(first, second)  # no dropout
    assert [module.training for module in network] == [True, False, True, True, True, True] and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert all(parameter.grad is None for name, parameter in network.named_parameters() if name != "0.weight")
    assert [parameter.requires_grad for parameter in network.parameters()] == [True] * 4 + [False] * 2


def test_pgd_works_in_chunks_and_under_no_grad():
    weight = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = Linear(1e-3 * weight), random_images(10, size=8), torch.arange(10) % 2, MEAN, STD
    with torch.no_grad():
        parts = pgd(*arguments, batch_size=3)
    assert torch.equal(parts, pgd(*arguments))
    assert not torch.equal(parts, arguments[1])
