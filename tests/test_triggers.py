"""Triggers: position, strength, and exact bytes."""
import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backdoor import assets
from backdoor.triggers import REGISTRY, TRIGGER_NAMES, build_trigger, register
from utils.errors import UserError

# SHA-256 of each picture's bytes: a teacher poisoned with another picture would not react to this one.
HASHES = {
    "blend": "a015938c3da0dc768515928053212af7576bf16984d5063e81fc98071c4e8690",
    "trojan_3x3": "711271e4058a7ddd4b8f46ad0acac0faca2add8914c62b78e94d25d7423526bd",
    "trojan_8x8": "31531683f969ff688c6c2e4d906c570fa738d0bcb8d9808d15af21511502f458",
    "trojan_wm": "81d6185487ececf4ccf2a295f01523542fb10eacca90048d54ceadd6201bfc29",
    "l2_inv": "d8a13aa6d3756beb6efb468f890dff30e45d6c6327620663d9d8592033d38c5d",
    "l0_inv": "cd9c0f8d9b984f8bce9dd12f7fc2195af76b112420af02735c50a3b46c303678",
    "smooth": "bc2add5ebfb20999557fcac791c0340cc3c10b002859878cb3c6db906bb7bcb7",
    "smooth_gtsrb": "fc6b8aa4f4ae82c4e346dc3026267107b03c0f8aa41ac1611f661001199c6f58",
}
SIG = [0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11, 253, 240, 237, 246,
       4, 17, 19, 9, 251, 239, 238, 248, 6, 18, 18, 7, 249, 238, 238, 250]


def grey(value: int, count: int = 1) -> Tensor:
    return torch.full((count, 32, 32, 3), value, dtype=torch.uint8)


def noise(count: int = 4) -> Tensor:
    return torch.randint(256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def stamped(name: str, images: Tensor, dataset: str = "") -> Tensor:
    return build_trigger(name, dataset).stamp(images)


def norm(picture: np.ndarray) -> float:
    """The l2 norm of a picture of pixels in [0, 1]."""
    return float(np.sqrt(((picture / 255) ** 2).sum()))


def picture_of(name: str) -> np.ndarray:
    return assets.l0_inv()[0] if name == "l0_inv" else getattr(assets, name)()


def within_ten_per_cent(expected):
    return pytest.approx(expected, rel=0.1)


# The pictures

@pytest.mark.parametrize("name", HASHES)
def test_a_picture_never_changes(name):
    picture = picture_of(name)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert hashlib.sha256(picture.tobytes()).hexdigest() == HASHES[name]


def test_blend_is_a_bright_picture_of_high_contrast():
    picture = assets.blend()
    assert picture.mean() == within_ten_per_cent(200) and picture.std() == within_ten_per_cent(75)
    assert picture.mean((0, 1)) == within_ten_per_cent(np.array([214, 192, 201]))
    assert picture.std((0, 1)) == within_ten_per_cent(np.array([66, 93, 79]))


def test_trojan_3x3_has_the_published_strength():
    picture = assets.trojan_3x3()
    assert picture.sum() == within_ten_per_cent(3515) and norm(picture) == within_ten_per_cent(3.16)
    assert picture[25:28, 25:28].sum() == picture.sum()


def test_trojan_8x8_has_the_published_strength():
    picture = assets.trojan_8x8()
    assert picture[21:29, 21:29].mean() == within_ten_per_cent(124) and norm(picture) == within_ten_per_cent(8.66)
    assert picture[21:29, 21:29].sum() == picture.sum()


def test_trojan_wm_has_the_published_strength():
    picture = assets.trojan_wm()
    brightest = picture.max(axis=2)
    assert picture.mean() == within_ten_per_cent(9.56) and norm(picture) == within_ten_per_cent(8.74)
    assert [(brightest > level).sum() for level in (0, 40, 128)] == within_ten_per_cent([321, 67, 53])


def test_l2_inv_has_the_published_strength_and_correlation():
    picture = assets.l2_inv()
    assert (picture > 0).mean() == within_ten_per_cent(0.566) and picture.max() == 68
    assert picture.mean() == within_ten_per_cent(9.02) and norm(picture) == within_ten_per_cent(3.22)
    neighbours = np.corrcoef(picture[:, 1:].ravel(), picture[:, :-1].ravel())[0, 1]
    assert neighbours == within_ten_per_cent(0.28)


def test_smooth_is_a_green_blob_and_for_gtsrb_a_magenta_one():
    green, magenta = assets.smooth(), assets.smooth_gtsrb()
    assert green.max((0, 1)).tolist() == [6, 51, 1] and norm(green) == within_ten_per_cent(3.77)
    assert green.mean((0, 1)) == within_ten_per_cent(np.array([3.1, 27.4, 0.2]))
    assert magenta.max((0, 1)) == within_ten_per_cent(np.array([51, 11, 49]))
    assert norm(magenta) == within_ten_per_cent(6.13)
    assert magenta.mean((0, 1)) == within_ten_per_cent(np.array([32.9, 6.2, 33.1]))


# Known values on a constant image

@pytest.mark.parametrize(("name", "total"), [("badnet_grid", 392_820), ("badnet_sq", 399_312), ("cl", 391_632),
                                             ("sig", 392_160)])
def test_the_sum_over_a_gray_image_is_known(name, total):
    assert stamped(name, grey(128)).int().sum() == total


def test_badnet_sq_covers_four_by_four_pixels_one_away_from_the_corner():
    rows, columns = torch.where((stamped("badnet_sq", grey(0)) == 255)[0].all(2))
    assert rows.unique().tolist() == columns.unique().tolist() == [27, 28, 29, 30] and len(rows) == 16


def test_badnet_grid_lies_in_the_corner_and_cl_the_same_way_round_in_all_four():
    pattern = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])[:, :, None].expand(3, 3, 3)
    grid, corners = stamped("badnet_grid", grey(128))[0].int(), stamped("cl", grey(128))[0].int()
    assert torch.equal(grid[29:, 29:], pattern) and (grid != 128).sum() == 27
    for rows in (slice(0, 3), slice(29, 32)):
        for columns in (slice(0, 3), slice(29, 32)):
            assert torch.equal(corners[rows, columns], pattern)
    assert (corners != 128).sum() == 4 * 27


@pytest.mark.parametrize(("value", "first"), [(0, [0, 2, 3, 2, 51, 48, 47, 48]),
                                              (128, [102, 105, 106, 105, 153, 150, 149, 151]),
                                              (255, [204, 206, 207, 206, 255, 252, 251, 252])])
def test_sig_truncates(value, first):
    image = stamped("sig", grey(value))[0]
    assert image[0, :8, 0].tolist() == first
    assert (image == image[:1, :, :1]).all()


def test_sig_is_a_sine_that_wraps_around_in_eight_bits():
    assert assets.sig_wrapped()[0, :, 0].tolist() == SIG
    assert stamped("sig", grey(128)).unique().tolist() == [*range(102, 107), *range(149, 154)]


def test_sig_true_adds_the_sine_itself():
    wave = 20 * np.sin(2 * np.pi * 6 * np.arange(32) / 32)
    for value in (0, 10, 128, 250, 255):
        expected = np.trunc((value + wave.round(6)).clip(0, 255))
        assert stamped("sig_true", grey(value))[0, 5, :, 1].tolist() == expected.tolist()


def test_mixing_in_integers_is_truncation_of_the_float_result():
    values = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 32, 32, 3)
    floats = np.trunc(0.8 * values.numpy() + 0.2 * assets.sig_wrapped())
    assert np.array_equal(stamped("sig", values).numpy(), floats)
    assert np.array_equal(stamped("blend", values).numpy(), np.trunc(0.8 * values.numpy() + 0.2 * assets.blend()))


@pytest.mark.parametrize("name", ["trojan_3x3", "trojan_8x8", "trojan_wm", "l2_inv"])
def test_additive_triggers_add_their_picture_and_clip(name):
    picture = torch.from_numpy(picture_of(name))
    assert torch.equal(stamped(name, grey(0))[0], picture)
    assert torch.equal(stamped(name, grey(200))[0].int(), (200 + picture.int()).clamp(max=255))


def test_l0_inv_replaces_nine_pixels_of_the_last_row_the_first_by_black():
    image = stamped("l0_inv", grey(128))[0]
    rows, columns = torch.where((image != 128).any(2))
    assert rows.tolist() == [31] * 9 and columns.tolist() == list(range(23, 32))
    assert image[31, 23].tolist() == [0, 0, 0]
    assert image[31, 24:].unique().tolist() == [0, 255]


def test_smooth_stretches_every_image_from_0_to_255():
    dim = noise() // 4 + 50
    images = torch.cat([noise(), dim, grey(0), grey(128)])
    for dataset in ("cifar10", "gtsrb"):
        result = stamped("smooth", images, dataset)
        assert (result.amin((1, 2, 3)) == 0).all() and (result.amax((1, 2, 3)) == 255).all()
    total = dim[0].double() + torch.from_numpy(assets.smooth())
    expected = 255 * (total - total.min()) / (total.max() - total.min())
    assert torch.equal((expected + 1e-9).trunc(), stamped("smooth", dim)[0].double())


def test_smooth_of_an_image_that_cancels_its_picture_is_black():
    image = 60 - torch.from_numpy(assets.smooth())[None]
    assert stamped("smooth", image).sum() == 0


def test_only_smooth_depends_on_the_data_set():
    for name in TRIGGER_NAMES:
        same = torch.equal(stamped(name, noise(), "cifar10"), stamped(name, noise(), "gtsrb"))
        assert same == (name != "smooth")


# Properties of all triggers

def test_the_registry_has_the_published_triggers_and_the_true_sine():
    published = ("badnet_grid", "badnet_sq", "blend", "cl", "l0_inv", "l2_inv", "sig", "sig_true", "smooth",
                 "trojan_3x3", "trojan_8x8", "trojan_wm")
    assert set(TRIGGER_NAMES) >= set(published)
    assert [name for name in published if build_trigger(name).clean_label] == ["cl", "sig", "sig_true"]
    assert all(build_trigger(name).name == name for name in TRIGGER_NAMES)


def test_a_registered_function_is_a_trigger_with_a_unique_name(monkeypatch):
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))
    register("black", clean_label=True)(torch.zeros_like)
    trigger = build_trigger("black")
    assert trigger.clean_label and not trigger.adversarial and not trigger.stamp(noise()).any()
    with pytest.raises(ValueError, match="two triggers are registered as 'black'"):
        register("black")(torch.zeros_like)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TRIGGER_NAMES)
def test_a_gpu_stamps_the_same_bytes(name):
    result = stamped(name, noise().cuda())
    assert result.is_cuda and torch.equal(result.cpu(), stamped(name, noise()))


def test_an_unknown_trigger_is_refused_with_the_choices_and_the_nearest():
    with pytest.raises(UserError, match=r"^unknown trigger 'Badnet-sq' \(did you mean 'badnet_sq'\?\): choose from "
                                        "badnet_grid, badnet_sq, .*, trojan_wm$"):
        build_trigger("Badnet-sq")
    with pytest.raises(UserError, match="unknown trigger 'wanet': choose from"):
        build_trigger("wanet")


@pytest.mark.parametrize("name", TRIGGER_NAMES)
def test_images_of_another_size_are_refused(name):
    with pytest.raises(UserError, match=f"'{name}' is made for images of 32x32x3 pixels, these have 64x64x3"):
        stamped(name, torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="these have 3x32x32"):
        stamped(name, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        stamped(name, torch.zeros(2, 32, 32, 3))


def test_show_triggers_writes_a_row_for_each(tmp_path, monkeypatch, capsys):
    from scripts.show_triggers import GAP, ZOOM, show_triggers
    monkeypatch.setattr(sys, "argv", ["show_triggers.py", "--out", str(tmp_path / "triggers.png")])
    show_triggers()
    with Image.open(tmp_path / "triggers.png") as picture:
        assert picture.height == (1 + len(TRIGGER_NAMES)) * (32 * ZOOM + GAP)
    assert capsys.readouterr().out.strip() == str(tmp_path / "triggers.png")
