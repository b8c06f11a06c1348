"""Batched augmentation equals torchvision image by image, and follows the parameters of the run."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

import datafree
from datafree.distiller import DataSpec
from datafree.ood import OoD
from model import build_model
from utils.augment import crop, crop_flip, normalize, pad, rotate_flip
from utils.data import chosen_augmentation
from utils.errors import UserError


def images_of(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random images without zeros, so that filled pixels differ from real ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def chw(image: Tensor) -> Tensor:
    return image.permute(2, 0, 1)


def by_torchvision(image: Tensor, flip: bool) -> Tensor:
    return (vision.hflip(image) if flip else image).permute(1, 2, 0)


def test_pad_surrounds_with_zeros():
    images = images_of(3, 6, 5)
    padded = pad(images, 2)
    assert padded.shape == (3, 10, 9, 3) and padded.dtype == torch.uint8 and padded.is_contiguous()
    assert torch.equal(padded[:, 2:-2, 2:-2], images)
    assert padded.int().sum() == images.int().sum()


@pytest.mark.parametrize("size", [32, 28])
def test_crop_and_flip_equal_torchvision_image_by_image(size):
    images = images_of(20, size, size)
    generator = torch.Generator().manual_seed(1)
    edges = torch.cartesian_prod(torch.tensor([0, 4, 8]), torch.tensor([0, 4, 8]), torch.tensor([0, 1]))
    drawn = torch.stack([torch.randint(high, (200,), generator=generator) for high in (9, 9, 2)], dim=1)
    top, left, flip = torch.cat([edges, drawn]).T
    index = torch.randint(20, top.shape, generator=generator)

    batch = crop_flip(pad(images, 4), index, top, left, flip.bool(), size)

    assert batch.shape == (len(top), size, size, 3) and batch.dtype == torch.uint8 and batch.is_contiguous()
    for i, y, x, mirrored, result in zip(index, top, left, flip, batch, strict=True):
        cropped = vision.crop(vision.pad(chw(images[i]), 4), int(y), int(x), size, size)
        assert torch.equal(result, by_torchvision(cropped, bool(mirrored)))


def test_a_crop_is_a_crop_without_a_flip():
    padded = pad(images_of(20, 32, 32), 4)
    generator = torch.Generator().manual_seed(1)
    index, top, left = (torch.randint(high, (200,), generator=generator) for high in (20, 9, 9))
    batch = crop(padded, index, top, left, 32)
    assert batch.is_contiguous()
    assert torch.equal(batch, crop_flip(padded, index, top, left, torch.zeros(200, dtype=torch.bool), 32))


def test_an_image_may_occur_several_times_in_a_batch():
    padded = pad(images_of(2, 8, 8), 1)
    index = torch.tensor([1, 1, 1])
    centre = torch.tensor([1, 1, 1])
    batch = crop_flip(padded, index, centre, centre, torch.tensor([False, True, False]), 8)
    assert torch.equal(batch[0], batch[2]) and torch.equal(batch[0], batch[1].flip(1))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (31, 48)])
def test_rotation_and_flip_equal_torchvision_image_by_image(height, width):
    """Every pixel: the source coordinates are computed in torchvision's order, so even float32 rounding agrees."""
    images = images_of(20, height, width)
    generator = torch.Generator().manual_seed(2)
    angle = torch.cat([torch.tensor([0.0, 20, -20, 0, 20, -20, 45, 90, 180]),
                       torch.rand(191, generator=generator) * 40 - 20])
    index = torch.randint(20, angle.shape, generator=generator)
    flip = torch.rand(angle.shape, generator=generator) < 0.5
    flip[:6] = torch.tensor([False, False, False, True, True, True])

    batch = rotate_flip(images, index, angle, flip)

    assert batch.shape == (200, height, width, 3) and batch.dtype == torch.uint8 and batch.is_contiguous()
    for i, degrees, mirrored, result in zip(index, angle, flip, batch, strict=True):
        rotated = vision.rotate(chw(images[i]), degrees.item(), InterpolationMode.NEAREST)
        assert torch.equal(result, by_torchvision(rotated, bool(mirrored)))


def test_rotation_by_zero_changes_nothing_and_a_positive_angle_turns_counter_clockwise():
    images = images_of(1, 16, 16)
    image, no = torch.tensor([0]), torch.tensor([False])
    assert torch.equal(rotate_flip(images, image, torch.tensor([0.0]), no), images)
    assert torch.equal(rotate_flip(images, image, torch.tensor([90.0]), no)[0], images[0].rot90(1))


def test_rotation_fills_with_zeros():
    corner = rotate_flip(images_of(1, 64, 64), torch.tensor([0]), torch.tensor([20.0]), torch.tensor([False]))[0, 0, 0]
    assert corner.tolist() == [0, 0, 0]


def test_normalize_equals_torchvision_in_channels_last():
    images = images_of(16, 32, 32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    result = normalize(images, torch.tensor(mean), torch.tensor(std))
    assert result.shape == (16, 3, 32, 32) and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([vision.normalize(vision.to_tensor(image.numpy()), mean, std) for image in images])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_normalize_accepts_slices_that_are_not_contiguous():
    images, one = images_of(4, 8, 8), torch.ones(3)
    whole = normalize(images, 0 * one, one)
    torch.testing.assert_close(normalize(images[:, ::2, 2:6], 0 * one, one), whole[:, :, ::2, 2:6])


def test_padding_is_black_and_not_the_mean():
    """Zero padding comes before normalization, so that a padded pixel is -mean / std, as in torchvision's order."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    nowhere = torch.zeros(1, dtype=torch.int64)
    batch = crop_flip(pad(images_of(1, 8, 8), 4), nowhere, nowhere, nowhere, torch.tensor([False]), 8)
    torch.testing.assert_close(normalize(batch, mean, std)[0, :, 0, 0], -mean / std)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_batches():
    images = images_of(50, 64, 64)
    generator = torch.Generator().manual_seed(3)
    index, top, left = (torch.randint(high, (128,), generator=generator) for high in (50, 9, 9))
    flip = torch.rand(128, generator=generator) < 0.5
    angle = torch.rand(128, generator=generator) * 40 - 20
    window, rotation = (pad(images, 4), index, top, left), (images, index, angle, flip)
    for function, arguments in ((crop, window), (crop_flip, (*window, flip))):
        on_gpu = function(*(value.cuda() for value in arguments), 64)
        assert torch.equal(on_gpu.cpu(), function(*arguments, 64))
    # Its cosine may round differently, which moves pixels that lie halfway between two others.
    differing = rotate_flip(*(value.cuda() for value in rotation)).cpu() != rotate_flip(*rotation)
    assert differing.float().mean() < 1e-5


@pytest.mark.parametrize("recipe", ["crop", "crop_flip", "rotate_flip"])
def test_augmentation_1_is_the_recipe_of_the_data_set_and_a_name_replaces_it(recipe):
    def chosen(**params):
        return chosen_augmentation(SimpleNamespace(augmentation=recipe), SimpleNamespace(**params))
    assert chosen(augmentation=True) == chosen() == recipe
    assert chosen(augmentation=False) is None
    assert chosen(augmentation="shift") == "crop"


@pytest.mark.parametrize("value, recipe, flips", [(1, "crop_flip", True), ("shift", "crop", False), (0, None, False)])
def test_data_free_methods_know_whether_classes_survive_a_mirror(call, experiment, tmp_path, monkeypatch, value, recipe,
                                                                 flips):
    def check(self, student, teacher, spec, params, dtype):
        assert (spec.augmentation, spec.flips) == (recipe, flips)
        raise UserError("that is all")
    monkeypatch.setattr(datafree.REGISTRY["cmi"], "__init__", check)
    teacher = tmp_path / "teacher.tar"
    torch.save({"state_dict": build_model("net", 3, num_channels=4).state_dict()}, teacher)
    directory = experiment(method="cmi", teacher_model="net", teacher_num_channels=4, teacher_resume=str(teacher),
                           augmentation=value)
    assert call("train_datafree", directory).stderr == "error: that is all\n"


@pytest.mark.parametrize("recipe, patches", [(None, None), ("crop", "crop"), ("rotate_flip", "crop_flip")])
def test_patches_are_mirrored_where_images_may_be_and_never_rotated(tmp_path, recipe, patches):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    params = OoD.Params(dataset="demo", method="ood", model_name="net", teacher_model="net", teacher_resume="x",
                       picture=str(picture), patches=4, batch_size=2)
    student, teacher = (build_model("net", 2, num_channels=4) for _ in range(2))
    spec = DataSpec(2, 32, torch.zeros(3), torch.ones(3), recipe)
    assert OoD(student, teacher.eval(), spec, params, torch.float32).batches.augmentation == patches
