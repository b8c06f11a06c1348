"""Parts of data-free distillation: losses, the generator of ZSKT, and a training set from one picture."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datafree.generator import Generator
from datafree.losses import attention_loss, attention_map, kl_element_mean
from datafree.patches import KINDS, balance, cutmix, draw_cutmix, draw_picture, load_picture, patches
from utils import seeds
from utils.errors import UserError
from utils.losses import kl_divergence, kl_per_sample

TEACHER = torch.tensor([[2.0, 0, -1], [0, 1, 0]])
STUDENT = torch.tensor([[1.0, 1, 0], [0.5, 0.5, 0.5]])


# Losses

def test_the_conventions_of_the_divergence_have_the_known_values():
    assert kl_element_mean(TEACHER, STUDENT, temperature=1).item() == pytest.approx(0.0838371, abs=1e-7)
    assert kl_divergence(TEACHER, STUDENT, temperature=1).item() == pytest.approx(0.2515114, abs=1e-7)
    assert 400 * kl_divergence(TEACHER, STUDENT, temperature=20).item() == pytest.approx(0.284797, rel=2e-5)
    assert kl_element_mean(TEACHER, STUDENT, temperature=8).item() == pytest.approx(0.00153001, rel=1e-5)
    assert 64 * kl_divergence(TEACHER, STUDENT, temperature=8).item() == pytest.approx(0.293761, rel=1e-5)
    assert kl_element_mean(TEACHER, STUDENT, temperature=0.5).item() == pytest.approx(0.1816, abs=5e-5)


def test_the_divergence_per_sample_has_the_batch_mean_as_its_mean():
    per_sample = kl_per_sample(TEACHER, STUDENT, temperature=4)
    assert per_sample.shape == (2,)
    for i in range(2):
        alone = kl_divergence(TEACHER[i:i + 1], STUDENT[i:i + 1], temperature=4)
        assert per_sample[i].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("divergence", [kl_per_sample, kl_element_mean])
def test_a_generator_gets_finite_gradients_through_both_networks_where_probabilities_underflow(divergence):
    spread = torch.tensor([[1000.0, 0, -1000]])
    for one, other in ((spread, torch.zeros(1, 3)), (torch.zeros(1, 3), spread), (spread, -spread)):
        logits = one.clone().requires_grad_(), other.clone().requires_grad_()
        for gradient in torch.autograd.grad(-divergence(*logits, temperature=1).sum(), logits):
            assert gradient.isfinite().all()


def test_attention_has_the_known_values_and_takes_other_channel_counts():
    activation = torch.arange(1.0, 9).view(1, 2, 2, 2)
    ones = torch.ones(1, 3, 2, 2)
    assert attention_map(activation)[0].tolist() == pytest.approx([0.2370, 0.3645, 0.5286, 0.7291], abs=5e-5)
    assert attention_map(ones)[0].tolist() == [0.5] * 4
    assert attention_loss([activation], [ones]).item() == pytest.approx(0.0352098, abs=1e-7)
    assert attention_loss([activation, ones], [ones, activation]).item() == pytest.approx(2 * 0.0352098, abs=2e-7)


def test_attention_does_not_depend_on_the_scale_and_a_dead_layer_has_finite_gradients():
    activation = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention_map(7 * activation), attention_map(activation))
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)
    gradient, = torch.autograd.grad(attention_loss([dead], [activation]), dead)
    assert gradient.isfinite().all()


def test_attention_of_another_number_of_layers_is_an_error():
    with pytest.raises(ValueError):
        attention_loss([torch.ones(1, 1, 2, 2)], [])


# Generator

def test_the_generator_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Generator().parameters()) == 1051145


@pytest.mark.parametrize("size", [32, 16, 28, 64])
def test_the_generator_makes_images_of_the_size_asked(size):
    with torch.device("meta"):
        assert Generator(latent_size=7, image_size=size)(torch.empty(5, 7)).shape == (5, 3, size, size)


def test_generated_images_are_normalized_and_parameters_get_gradients():
    torch.manual_seed(0)
    generator = Generator(image_size=16)
    images = generator(torch.randn(32, 100))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=1e-2)
    images.pow(3).sum().backward()
    assert all(parameter.grad.any() for parameter in generator.parameters() if parameter.ndim > 1)


def test_the_generator_upsamples_by_nearest_neighbor_with_leaky_relu_of_a_fifth():
    doublings = [module for module in Generator().layers if isinstance(module, nn.Upsample)]
    assert [(module.scale_factor, module.mode) for module in doublings] == [(2.0, "nearest")] * 2
    assert {module.negative_slope for module in Generator().layers if isinstance(module, nn.LeakyReLU)} == {0.2}


def test_an_image_size_that_is_no_multiple_of_4_is_an_error():
    with pytest.raises(ValueError, match="multiple of 4, not 30"):
        Generator(image_size=30)


# One picture

@pytest.fixture(scope="module")
def picture():
    return draw_picture(0, 320, 240)


def test_a_picture_derives_from_its_seed_and_has_structure_everywhere(picture):
    assert picture.shape == (240, 320, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture, draw_picture(0, 320, 240))
    assert not torch.equal(picture, draw_picture(1, 320, 240))
    for tile in picture.float().unfold(0, 80, 80).unfold(1, 80, 80).reshape(12, -1):
        assert tile.std() > 20


def test_any_picture_of_the_user_can_be_loaded(tmp_path, picture):
    Image.fromarray(picture.numpy()).save(tmp_path / "rgb.png")
    assert torch.equal(load_picture(tmp_path / "rgb.png"), picture)
    Image.fromarray(picture[..., 0].numpy()).save(tmp_path / "grey.png")
    assert torch.equal(load_picture(tmp_path / "grey.png"), picture[..., :1].expand(-1, -1, 3))


def test_an_unreadable_picture_is_a_user_error(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    for name, words in (("text.png", "identify"), ("none.png", "No such file"), ("deep.png", "8 bits")):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture: .*{words}"):
            load_picture(tmp_path / name)


def test_patches_derive_from_their_seed_and_differ_from_each_other(picture):
    cut = patches(picture, 50, 32, seed=3)
    assert cut.shape == (50, 32, 32, 3) and cut.dtype == torch.uint8 and cut.is_contiguous()
    assert torch.equal(cut, patches(picture, 50, 32, seed=3))
    assert not torch.equal(cut, patches(picture, 50, 32, seed=4))
    assert len(cut.flatten(1).unique(dim=0)) == 50


def test_zero_patches_are_an_empty_set(picture):
    assert patches(picture, 0, 32, seed=0).shape == (0, 32, 32, 3)


def test_patches_take_turns_among_the_kinds(picture):
    color, grey, blob = (patches(picture, 90, 16, seed=0, kinds=KINDS)[i::3].float() for i in range(3))
    assert (color.max(3).values > color.min(3).values).any((1, 2)).all()
    for kind in (grey, blob):
        assert torch.equal(kind[..., 0], kind[..., 1]) and torch.equal(kind[..., 0], kind[..., 2])
    # Of a patch minus its mean, clamped at 0, some is black and some is not; a blob leaves the corners black.
    assert (grey == 0).any((1, 2, 3)).all() and (grey > 0).any((1, 2, 3)).all()
    corners = blob[:, [0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert (corners == 0).float().mean() > 0.95
    assert ((blob > 0).float().mean((1, 2, 3)) > 0.05).all()


def test_patches_of_a_one_color_picture_have_that_color_or_are_black_or_jittered():
    cut = patches(torch.full((128, 128, 3), 100, dtype=torch.uint8), 400, 32, seed=0)
    centre = cut[:, 16, 16]
    assert (cut[:, 8:24, 8:24] == centre[:, None, None]).all()  # the core always lies inside
    untouched = (centre == 100).all(1)
    assert untouched.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert set(cut[untouched].unique().tolist()) == {0, 100}
    assert centre.min() >= 50 and centre.max() <= 160


def test_views_of_a_gradient_have_the_areas_angles_and_positions_of_the_recipe():
    """Red encodes x and green y, so each patch shows its crop position; blue shows which patches are not jittered."""
    side = 256
    ramp = torch.arange(side).expand(side, side)
    picture = torch.stack([ramp, ramp.T, torch.full_like(ramp, 128)], -1).byte()
    cut = patches(picture, 3000, 32, seed=0).double()
    core = cut[:, 12:20, 12:20]
    across = (core[:, :, -1] - core[:, :, 0]).mean(1)[:, :2] / 7  # in pixels of the picture per pixel of the patch
    down = (core[:, -1] - core[:, 0]).mean(1)[:, :2] / 7
    plain = (core[..., 2] == 128).all(2).all(1)
    area = (across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0])[plain] * 45**2 / (side / 2)**2
    assert plain.double().mean().item() == pytest.approx(0.5, abs=0.05)
    # Uniform areas; those that do not fit are redrawn: with x = log(4/3), the mean over aspects of
    # exp(-2 |log aspect|) / 2 over that of exp(-|log aspect|).
    x = math.log(4 / 3)
    expected = (1 - math.exp(-2 * x)) / 4 / (1 - math.exp(-x))
    assert area.mean().item() == pytest.approx(expected, abs=0.03)
    assert area.max() < 1.1
    centre = core.mean((1, 2))[plain, :2]
    assert centre.min() > 0 and centre.max() < side
    assert centre.mean(0).tolist() == pytest.approx([side / 2] * 2, abs=side / 20)


def test_large_views_are_antialiased():
    """A view of a fine checkerboard that is scaled down by 4 or more is almost uniformly gray."""
    board = (torch.arange(1024)[:, None] + torch.arange(1024)) % 2 * 255
    cut = patches(board[..., None].expand(-1, -1, 3).byte(), 300, 32, seed=0).float()
    spread = cut[:, 8:24, 8:24].std((1, 2, 3))
    assert (spread < 10).float().mean() > 0.8


def test_a_picture_too_small_and_an_unknown_kind_are_errors(picture):
    with pytest.raises(UserError, match="320x240 pixels is too small for patches of 128x128"):
        patches(picture, 1, 128, seed=0)
    with pytest.raises(ValueError, match="colour, grey, blob"):
        patches(picture, 1, 32, seed=0, kinds=("color",))


# Balance

def times(indices, number):
    return torch.bincount(indices, minlength=number)


def test_balanced_classes_come_equally_often_and_their_images_too():
    predicted = torch.cat([torch.zeros(900), torch.ones(60), torch.full((40,), 2)]).long()
    indices = balance(predicted, 360, 3, max_per_class=6)
    assert torch.bincount(predicted[indices]).tolist() == [120] * 3
    often = times(indices, 1000)
    assert set(often[:900].tolist()) == {0, 1} and set(often[900:960].tolist()) == {2}
    assert set(often[960:].tolist()) == {3}


def test_a_rare_class_gives_all_its_images_and_the_others_share_the_remainder():
    predicted = torch.cat([torch.zeros(500), torch.ones(500), torch.full((5,), 2)]).long()
    indices = balance(predicted, 430, 4, max_per_class=6)
    assert torch.bincount(predicted[indices], minlength=4).tolist() == [200, 200, 30, 0]
    assert times(indices, 1005).max() == 6


def test_balancing_with_a_remainder_returns_the_requested_count():
    assert len(balance(torch.arange(30) % 3, 32, 3)) == 32


def test_balancing_derives_from_its_seed_and_shuffles_the_classes():
    predicted = torch.arange(300) // 100
    indices = balance(predicted, 300, 3, seed=1)
    assert torch.equal(indices, balance(predicted, 300, 3, seed=1))
    assert not torch.equal(indices, balance(predicted, 300, 3, seed=2))
    assert set(predicted[indices[:30]].tolist()) == {0, 1, 2}


def test_too_few_images_for_the_count_are_a_user_error():
    with pytest.raises(UserError, match="10 images, each at most 6 times, do not make 61"):
        balance(torch.zeros(10, dtype=torch.int64), 61, 3)


# CutMix

def test_cutmix_copies_a_box_from_the_partner():
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    original = images.clone()
    random = seeds.generator(0, "cutmix")
    for _ in range(50):
        draw = draw_cutmix(6, 16, random)
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[draw.top:draw.bottom, draw.left:draw.right] = True
        assert torch.equal(cutmix(images, draw), torch.where(inside, images[draw.partner], images))
        assert draw.partner.sort().values.tolist() == list(range(6))
    assert torch.equal(images, original)


def test_the_box_covers_at_most_1_minus_lambda_and_lambda_is_a_beta_of_a_quarter(monkeypatch):
    from datafree import patches as module
    drawn, beta = [], module._beta
    monkeypatch.setattr(module, "_beta", lambda *arguments: drawn.append(beta(*arguments)) or drawn[-1])
    random = seeds.generator(0, "cutmix")
    for _ in range(4000):
        draw = draw_cutmix(2, 32, random)
        assert 0 <= draw.top <= draw.bottom <= 32 and 0 <= draw.left <= draw.right <= 32
        area = (draw.bottom - draw.top) * (draw.right - draw.left) / 32**2
        assert area <= 1 - drawn[-1] + 1e-12
    mixed = np.array(drawn)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)) = 1/6, and more than a third within a hundredth of the ends.
    assert mixed.mean() == pytest.approx(0.5, abs=0.03)
    assert mixed.var() == pytest.approx(1 / 6, abs=0.01)
    assert ((mixed < 0.01) | (mixed > 0.99)).mean() > 1 / 3


@pytest.mark.parametrize(("side", "expected"), [(0, 0), (1, 0), (2, 2), (3, 2), (8, 8), (9, 8), (15, 14)])
def test_the_side_of_a_box_is_rounded_down_to_an_even_number_of_pixels(monkeypatch, side, expected):
    """The box of a center c has the rows c - side // 2 to c + side // 2 - 1, those inside the image."""
    monkeypatch.setattr("datafree.patches._beta", lambda *_: 1 - ((side + 0.5) / 32)**2)
    random = seeds.generator(0, "cutmix")
    rows = {(draw.top, draw.bottom) for draw in (draw_cutmix(2, 32, random) for _ in range(500))}
    half = expected // 2
    assert rows == {(max(center - half, 0), min(center + half, 32)) for center in range(32)}


def test_cutmix_derives_from_its_generator_and_keeps_channels_last():
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    one, again = (draw_cutmix(4, 8, seeds.generator(9)) for _ in range(2))
    assert torch.equal(one.partner, again.partner) and one[1:] == again[1:]
    assert cutmix(images, one).is_contiguous(memory_format=torch.channels_last)
    assert math.isfinite(cutmix(images, one).sum())
