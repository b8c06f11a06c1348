"""Losses of inverted images, compared with values computed by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.contrast import MemoryBank, ProjectionHead, contrast_loss, instance_means
from datafree.distiller import DataSpec
from datafree.generator import Generator
from datafree.inversion import (
    activation_loss,
    adversarial_js,
    adversarial_kl,
    batch_norm_loss,
    information_entropy_loss,
    total_variation,
)
from datafree.pool import ImagePool
from datafree.synthesis import Best
from datafree.views import random_crop, random_resized_crop, random_roll
from model import build_model
from model.features import batch_norms, capture_inputs


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_generators_and_the_head_have_the_known_numbers_of_parameters():
    assert count(Generator(100)) == 1_051_145
    assert count(Generator(256, pixels=True)) == 2_328_899
    assert count(Generator(256, width=256, pixels=True)) == 4_581_955
    assert count(Generator(512, width=256, pixels=True)) == 8_776_259
    assert count(ProjectionHead(912)) == 1_066_384


def test_a_generator_of_pixels_stays_within_0_and_1():
    images = Generator(8, 16, pixels=True)(10 * torch.randn(4, 8, generator=random()))
    assert images.shape == (4, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1


def test_a_reset_generator_keeps_its_running_statistics():
    generator = Generator(8, 16, pixels=True)
    generator(torch.randn(4, 8, generator=random()))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generator.reinitialize(random())
    after = generator.state_dict()
    assert all(torch.equal(before[name], after[name]) == ("running" in name or "num_batches" in name)
               for name in before if "layers.0.bias" not in name and not name.endswith(("3.bias", "7.bias")))
    assert after["linear.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert after["layers.3.weight"].mean().item() == pytest.approx(1, abs=0.01)
    assert not after["linear.bias"].any()
    again = Generator(8, 16, pixels=True)
    again.reinitialize(random())
    assert torch.equal(after["linear.weight"], again.state_dict()["linear.weight"])


@pytest.mark.parametrize("name, features", [("wrn16_1", 464), ("wrn16_2", 912), ("wrn40_2", 2704)])
def test_the_features_are_the_channels_of_all_batch_norms(name, features):
    teacher = build_model(name, 10).eval()
    with torch.inference_mode(), capture_inputs(teacher, *batch_norms(teacher)) as captured:
        teacher(torch.zeros(2, 3, 32, 32))
    assert instance_means(captured).shape == (2, features)


def test_the_loss_of_batch_norms_is_the_distance_of_mean_and_of_variance():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)).eval()
    network[0].running_mean.copy_(torch.tensor([1.0, 0.0]))
    images = torch.tensor([[3.0, 0.0], [1.0, 4.0]]).view(2, 2, 1, 1).requires_grad_()
    with capture_inputs(network, "0", "2") as captured:
        network(images)
    # First layer: means 2 and 2, variances 1 and 4 (divided by N), running statistics 1 and 0, 1 and 1.
    first = math.hypot(1, 2) + 3
    second = torch.relu(network[0](images)).detach().view(2, 2)
    expected = first + second.mean(0).norm().item() + (second.var(0, correction=0) - 1).norm().item()
    loss = batch_norm_loss(captured)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(loss, images)[0].any()


def test_instance_means_are_means_over_positions():
    with capture_inputs(layer := nn.BatchNorm2d(2), "") as captured:
        layer(torch.arange(8.0).view(1, 2, 2, 2).repeat(2, 1, 1, 1))
    assert instance_means(captured).tolist() == [[1.5, 5.5]] * 2


TEACHER = torch.tensor([[2.0, 0, -1], [0, 1, 0]])
STUDENT = torch.tensor([[1.0, 1, 0], [0.5, 0.5, 0.5]])


def test_adversarial_kl_is_minus_the_divergence_of_counted_samples():
    # The mean over the batch is known. The argmax of the student's ties is class 0, so only the first image counts.
    assert adversarial_kl(TEACHER, STUDENT).item() == pytest.approx(-0.2515114, abs=1e-6)
    first = F.kl_div(STUDENT[:1].log_softmax(1), TEACHER[:1].log_softmax(1), reduction="sum", log_target=True)
    assert adversarial_kl(TEACHER, STUDENT, agreeing_only=True).item() == pytest.approx(-first.item() / 2, rel=1e-6)
    assert adversarial_kl(TEACHER, STUDENT.flip(1), agreeing_only=True) == 0 * adversarial_kl(TEACHER, TEACHER)


def test_competition_is_one_minus_jensen_shannon_at_temperature_3():
    p, q = (3 * torch.tensor([row]).log() for row in ([0.75, 0.25], [0.25, 0.75]))
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert adversarial_js(p, q).item() == pytest.approx(1 - kl, rel=1e-5)
    assert adversarial_js(p, p).item() == pytest.approx(1)
    far = torch.tensor([[500.0, 0]]).requires_grad_()
    loss = adversarial_js(far, -far.detach())
    assert loss.item() == pytest.approx(1 - math.log(2))
    assert torch.autograd.grad(loss, far)[0].isfinite().all()


def test_information_entropy_loss_is_the_negative_entropy_of_the_mean_prediction():
    sure = 100 * torch.eye(2)
    assert information_entropy_loss(sure).item() == pytest.approx(-math.log(2))
    assert information_entropy_loss(sure[:1]).item() == pytest.approx(0)


def test_the_activation_loss_is_known():
    assert activation_loss(torch.tensor([[1.0, -3.0]])).item() == -2


@pytest.mark.parametrize("count", [1, 5])
def test_the_total_variation_and_its_gradient_are_known(count):
    """Mean absolute differences: across (1 + 2) / 2, down (2 + 3) / 2, diagonals 4 and 1."""
    images = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).repeat(count, 1, 1, 1).requires_grad_()
    loss = total_variation(images)
    assert loss.item() == pytest.approx(1.5 + 2.5 + 4 + 1)
    gradient, = torch.autograd.grad(loss, images)
    expected = torch.tensor([[-0.5 - 0.5 - 1, 0.5 - 0.5 - 1], [-0.5 + 0.5 + 1, 0.5 + 0.5 + 1]]) / count
    torch.testing.assert_close(gradient, expected.expand_as(gradient))


def test_the_contrastive_loss_of_orthogonal_images_is_known():
    """With an identity head and equal unit features e1, e2 on both sides, all similarities are 0 or 1."""
    present, earlier = torch.eye(4)[:2], torch.eye(4)[2:]

    def expected(images):
        return math.log(1 + (images - 1) * math.exp(-10))
    alone = contrast_loss(nn.Identity(), present, present, torch.empty(0, 2, 4), temperature=0.1)
    assert alone.item() == pytest.approx(expected(2), rel=1e-3)
    remembered = torch.stack([earlier, earlier.flip(0)], 1)  # whose two views do not fit
    both = contrast_loss(nn.Identity(), present, present, remembered, temperature=0.1)
    assert both.item() == pytest.approx(expected(4) + 10 + math.log(1 + 3 * math.exp(-10)), rel=1e-3)


def test_the_right_side_of_the_contrast_does_not_learn():
    local, whole = torch.randn(3, 4, generator=random()).requires_grad_(), torch.randn(3, 4).requires_grad_()
    loss = contrast_loss(nn.Identity(), local, whole, torch.empty(0, 2, 4), temperature=0.1)
    grads = torch.autograd.grad(loss, (local, whole), allow_unused=True)
    assert grads[0].any() and grads[1] is None


def test_a_bank_serves_its_rows_when_full_and_after_overflow():
    bank = MemoryBank(6, 1, torch.device("cpu"))
    assert bank.draw(4, random()).shape == (0, 2, 1)
    for start in (0, 2):
        bank.add(torch.arange(start, start + 2.0).view(2, 1, 1).expand(2, 2, 1))
    assert sorted(bank.draw(9, random())[:, 0, 0].tolist()) == [0, 1, 2, 3]
    bank.add(torch.tensor([4.0, 5.0]).view(2, 1, 1).expand(2, 2, 1))
    assert sorted(bank.draw(6, random())[:, 1, 0].tolist()) == [0, 1, 2, 3, 4, 5]  # exactly full
    bank.add(torch.tensor([6.0, 7.0, 8.0, 9.0]).view(4, 1, 1).expand(4, 2, 1))
    assert sorted(bank.draw(9, random())[:, 1, 0].tolist()) == [4, 5, 6, 7, 8, 9]
    other = MemoryBank(6, 1, torch.device("cpu"))
    other.load_state_dict(bank.state_dict())
    other.add(torch.full((1, 2, 1), 10.0))
    assert sorted(other.draw(9, random())[:, 1, 0].tolist()) == [5, 6, 7, 8, 9, 10]


def test_the_published_bank_holds_160_batches_of_256_and_serves_4096_rows():
    bank = MemoryBank(40_960, 2, torch.device("cpu"))
    for _ in range(160):
        bank.add(torch.ones(256, 2, 2))
    assert len(bank) == 40_960
    assert bank.draw(4096, random()).shape == (4096, 2, 2)


def test_random_crops_of_padded_images_pass_gradients():
    images = torch.rand(6, 3, 8, 8, generator=random(1)).requires_grad_()
    views = random_crop(images, random(), padding=2, flip=True)
    padded = F.pad(images.detach(), (2,) * 4)
    crops = [(padded[:, :, top:top + 8, left:left + 8], flip) for top in range(5) for left in range(5)
             for flip in (False, True)]
    for number, view in enumerate(views):
        assert any(torch.equal(view, crop[number].flip(2) if flip else crop[number]) for crop, flip in crops)
    assert len({tuple(view.flatten().tolist()) for view in random_crop(images[:1].expand(40, -1, -1, -1), random(),
                                                                   padding=2, flip=True)}) > 10
    views.sum().backward()
    assert images.grad.max() == 1


def test_signs_are_not_mirrored():
    images = torch.arange(8.0).expand(20, 1, 8, 8)  # brighter to the right
    for view in (random_crop(images, random(), padding=0, flip=False),
                 random_resized_crop(images, random(), scale=(0.25, 1.0), flip=False)):
        assert (view[..., 1:] >= view[..., :-1]).all()
    assert not (random_crop(images, random(), padding=0, flip=True).diff() >= 0).all()
    assert not (random_resized_crop(images, random(), scale=(0.25, 1.0), flip=True).diff() >= 0).all()
    assert all(torch.equal(random_roll(images, random(seed), pixels=0, flip=False), images) for seed in range(5))


def test_a_resized_crop_shows_its_fraction_of_the_image():
    ramp = torch.linspace(-1, 1, 64).expand(200, 1, 64, 64)
    views = random_resized_crop(ramp, random(), scale=(0.25, 0.25), flip=False)
    width = (views[..., -1] - views[..., 0]).mean(2).flatten() / 2 * 64 / 63  # in images
    height = 0.25 / width
    assert (width / height).min() > 0.7 and (width / height).max() < 1.4
    assert width.std() > 0.02
    same = random_resized_crop(ramp, random(), scale=(1.0, 1.0), flip=False)
    assert same.shape == ramp.shape


def test_a_resized_crop_is_as_exact_under_autocast():
    images = torch.rand(8, 3, 32, 32, generator=random(3))
    exact = random_resized_crop(images, random(), scale=(0.25, 1.0), flip=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_resized_crop(images, random(), scale=(0.25, 1.0), flip=True), exact)


def test_the_contrast_is_as_exact_under_autocast():
    views = torch.randn(64, 3, generator=random())
    exact = contrast_loss(nn.Identity(), views, views, torch.empty(0, 2, 3), temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast_loss(nn.Identity(), views, views, torch.empty(0, 2, 3), temperature=0.1) == exact


def test_rolled_images_are_the_same_pixels_elsewhere():
    images = torch.rand(2, 1, 6, 6, generator=random(2))
    for seed in range(5):
        view = random_roll(images, random(seed), pixels=4, flip=True)
        assert torch.equal(view.flatten(1).sort().values, images.flatten(1).sort().values)


def test_the_best_of_several_steps_is_kept():
    best = Best()
    for loss, value in ((3.0, 1.0), (1.0, 2.0), (2.0, 3.0), (math.nan, 4.0)):
        best.update(torch.tensor(loss), torch.full((2,), value), torch.tensor(value))
    assert [tensor.tolist() for tensor in best.tensors] == [[2, 2], 2]


def test_a_pool_truncates_to_8_bits_and_serves_unlimited_batches():
    pool = ImagePool(DataSpec(2, 4, torch.zeros(3), torch.ones(3), "crop_flip"))
    pool.add(torch.tensor([0.0, 0.9999, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4), torch.tensor([0, 0, 1]))
    assert pool.images[:, 0, 0, 0].tolist() == [0, 254, 255]
    batches = list(pool.batches(5, 2, random()))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2]
    assert all(batch.shape[1:] == (3, 4, 4) for batch in batches)
    assert [batch.shape[0] for batch in pool.batches(2, 100, random())] == [3, 3]
