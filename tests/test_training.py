"""Training loop and batches: schedule, exact evaluation, seeds, and non-finite values."""
import csv
import math

import pytest
import torch
from conftest import results
from torch import nn

from model import build_model
from runs.stages import ScratchParams
from utils import distributed, seeds
from utils.data import Batch, Images, TrainBatches, in_order, split
from utils.datasets import Dataset
from utils.device import choose_dtype
from utils.errors import UserError
from utils.evaluation import Frozen, evaluate
from utils.losses import cross_entropy
from utils.supervised import build_optimizer, check_finite, learning_rate
from utils.training import Progress

CPU = torch.device("cpu")


def params(**values):
    return ScratchParams.model_validate({"dataset": "demo", "model_name": "resnet18", "learning_rate": 0.1,
                                         "num_epochs": 3, **values})


def images(count=23, classes=4):
    """`count` images whose first pixel is their index."""
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=seeds.generator("test"))
    pixels[:, 0, 0, 0] = torch.arange(count)
    return Images(pixels, torch.arange(count) % classes, torch.zeros(3), torch.ones(3))


def numbers(epoch):
    """Indices of all images of an epoch, in order."""
    return [number for batch in epoch for number in (batch.images[:, 0, 0, 0] * 255).round().long().tolist()]


def test_the_learning_rate_drops_at_each_epoch_of_the_schedule_counted_from_0():
    published = params(schedule=[60, 120, 160], gamma=0.2)
    assert [learning_rate(published, epoch) for epoch in (0, 59)] == [0.1, 0.1]
    assert [learning_rate(published, epoch) for epoch in (60, 119, 120, 160, 199)] == pytest.approx(
        [0.02, 0.02, 0.004, 0.0008, 0.0008])


def test_the_optimizer_is_that_of_the_recipe():
    sgd = build_optimizer(params(), nn.Linear(2, 2))
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"], sgd.defaults["nesterov"]) == (0.9, 5e-4, False)
    for name in ("net", "mlp"):
        adam = build_optimizer(params(), build_model(name, 4))
        assert type(adam) is torch.optim.Adam
        assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.9, 0.999), 0)


def test_an_epoch_visits_every_image_once_in_batches_of_the_size_asked_for():
    batches = TrainBatches(images(23), 8, None, seed=0)
    epoch = list(batches.epoch(0))
    assert [len(batch.labels) for batch in epoch] == batches.batch_sizes() == [8, 8, 7]
    assert sorted(numbers(epoch)) == list(range(23))
    assert [number % 4 for number in numbers(epoch)] == torch.cat([batch.labels for batch in epoch]).tolist()


def test_a_last_batch_of_a_single_image_is_left_for_another_epoch():
    """Batch normalization needs more than one image."""
    batches = TrainBatches(images(17), 8, None, seed=0)
    assert batches.batch_sizes() == [8, 8]
    left_out = set().union(*(set(range(17)) - set(numbers(batches.epoch(epoch))) for epoch in range(9)))
    assert len(left_out) > 1


@pytest.mark.parametrize("augmentation", [None, "crop", "crop_flip", "rotate_flip"])
def test_an_epoch_derives_from_seed_and_epoch_alone(augmentation):
    def epoch(seed, number, earlier=()):
        batches = TrainBatches(images(), 8, augmentation, seed)
        for other in earlier:
            list(batches.epoch(other))
        return torch.cat([batch.images for batch in batches.epoch(number)])
    assert torch.equal(epoch(0, 3), epoch(0, 3, earlier=(0, 1, 2)))
    assert not torch.equal(epoch(0, 3), epoch(0, 2))
    assert not torch.equal(epoch(0, 3), epoch(1, 3))


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip", "rotate_flip"])
def test_processes_split_the_same_epoch(monkeypatch, augmentation):
    whole = list(TrainBatches(images(21), 8, augmentation, seed=5).epoch(2))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(TrainBatches(images(21), 8, augmentation, seed=5).epoch(2)))
    for step, batch in enumerate(whole):
        for number, tensor in enumerate(batch[:3]):
            assert torch.equal(torch.cat([share[step][number] for share in shares]), tensor)
        assert all(share[step].epoch == batch.epoch == 2 for share in shares)


def white_pixels(count, augmentation):
    """Rows and columns to which augmentation moves the white pixel at (16, 12) of `count` black images."""
    pixels = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    pixels[:, 16, 12] = 255
    part = Images(pixels, torch.zeros(count, dtype=torch.int64), torch.zeros(3), torch.ones(3))
    batch = torch.cat([batch.images for batch in TrainBatches(part, 900, augmentation, seed=0).epoch(0)])
    places = batch[:, 0].flatten(1).argmax(1)
    return places // 32, places % 32


def test_shifts_and_flips_are_uniform():
    """The 8,100 images cover 9 x 9 offsets, with and without flip."""
    count = 8100
    rows, columns = white_pixels(count, "crop_flip")
    assert set(rows.tolist()) == set(range(12, 21))
    assert set(columns.tolist()) == set(range(8, 17)) | set(range(15, 24))
    row_counts = torch.bincount(rows)[12:]
    assert (row_counts - count / 9).abs().max() < 5 * math.sqrt(count / 9)
    only_flipped = ((columns > 16).sum() / (7 / 9)).item()
    assert abs(only_flipped - count / 2) < 5 * math.sqrt(count / 2)


def test_a_crop_shifts_and_does_not_flip():
    count = 8100
    rows, columns = white_pixels(count, "crop")
    offsets = torch.bincount((rows - 12) * 9 + columns - 8, minlength=81)
    assert len(offsets) == 81
    assert (offsets - count / 81).abs().max() < 5 * math.sqrt(count / 81)


def test_each_view_of_an_image_has_a_number():
    """Views with equal numbers are equal images, and the augmentation declares how many numbers there are."""
    part = images(1)
    many = Images(part.images.expand(2000, -1, -1, -1), part.labels.expand(2000), part.mean, part.std)
    for augmentation, count in ((None, 1), ("crop", 81), ("crop_flip", 162)):
        batches = TrainBatches(many, 2000, augmentation, seed=0)
        draw, = batches.draws(0, CPU)
        views, made = batches.view(draw), batches.gather(draw).images
        assert batches.views == count
        assert sorted(set(views.tolist())) == list(range(count))
        assert len(made.unique(dim=0)) == count
        first = torch.stack([made[views == view][0] for view in range(count)])
        assert torch.equal(first[views], made)
    assert TrainBatches(many, 2000, "rotate_flip", seed=0).views is None


def test_batches_are_channels_last_float32_and_normalized():
    part = images()
    part = Images(part.images, part.labels, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4]))
    batch, labels, *_ = next(TrainBatches(part, 8, "crop_flip", seed=0).epoch(0))
    assert batch.shape == (8, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    plain, _ = next(in_order(part))
    expected = (part.images.permute(0, 3, 1, 2).float() / 255 - part.mean.view(3, 1, 1)) / part.std.view(3, 1, 1)
    torch.testing.assert_close(plain, expected)


def test_a_validation_part_is_held_out_of_the_training_images():
    part = images(20)
    dataset = Dataset("x", part.images, part.labels, part.images[:5], part.labels[:5], tuple("abcd"), (0.0,) * 3,
                      (1.0,) * 3, "crop_flip")
    assert set(split(dataset, params(), CPU)) == {"train", "test"}
    parts = split(dataset, params(validation_fraction=0.25), CPU)
    held_out, rest = (set(parts[name].images[:, 0, 0, 0].tolist()) for name in ("validation", "train"))
    assert (len(held_out), len(rest)) == (5, 15)
    assert held_out | rest == set(range(20))
    other = set(split(dataset, params(validation_fraction=0.25, seed=1), CPU)["validation"].images[:, 0, 0, 0].tolist())
    assert other != held_out
    assert len(split(dataset, params(validation_fraction=0.001), CPU)["validation"]) == 1


def test_mean_and_std_of_params_json_replace_those_of_the_data_set():
    part = images(4)
    dataset = Dataset("x", part.images, part.labels, part.images, part.labels, tuple("abcd"), (0.5,) * 3, (0.5,) * 3,
                      "crop_flip")
    assert split(dataset, params(), CPU)["test"].mean.tolist() == [0.5] * 3
    other = split(dataset, params(mean=[0.0, 0.25, 0.5], std=[1.0, 1.0, 0.25]), CPU)["train"]
    assert (other.mean.tolist(), other.std.tolist()) == ([0.0, 0.25, 0.5], [1.0, 1.0, 0.25])


def test_too_few_images_are_an_error(monkeypatch):
    with pytest.raises(UserError, match="1 training images are too few"):
        TrainBatches(images(1), 8, None, seed=0)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(UserError, match="a batch of 2 images cannot be shared by 4 processes"):
        TrainBatches(images(), 2, None, seed=0)


def test_evaluation_is_exact_over_all_images_in_eval_mode():
    part = images(1203)
    network = build_model("net", 4, num_channels=4, dropout_rate=0.5)
    row = evaluate(network, part, torch.float32)
    assert network.training
    with torch.inference_mode():
        logits = network.eval()(part.images.permute(0, 3, 1, 2).float() / 255)
    assert row["accuracy"] == pytest.approx(100 * (logits.argmax(1) == part.labels).sum().item() / 1203, abs=1e-12)
    assert row["loss"] == pytest.approx(cross_entropy(logits, part.labels).item(), rel=1e-5)


def test_a_frozen_network_runs_in_eval_mode_and_a_loss_may_use_its_logits():
    network = build_model("net", 4, num_channels=4, dropout_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    frozen = Frozen(network)
    batch = Batch(torch.randn(8, 3, 32, 32))
    logits = frozen(batch)
    weights = torch.randn(8, 4, requires_grad=True)
    (logits * weights).sum().backward()
    assert torch.equal(weights.grad, logits)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_best_epoch_is_the_later_one_on_a_tie():
    history = [{"epoch": i + 1, "test_accuracy": accuracy} for i, accuracy in enumerate((50.0, 70.0, 70.0, 60.0))]
    assert Progress(history).best["epoch"] == 3


def test_held_out_images_select_the_best_epoch():
    history = [{"epoch": 1, "validation_accuracy": 80.0, "test_accuracy": 50.0},
               {"epoch": 2, "validation_accuracy": 70.0, "test_accuracy": 90.0}]
    assert Progress(history).best["epoch"] == 1


def test_best_model_is_the_epoch_of_highest_test_accuracy(call, experiment):
    directory = experiment(num_epochs=6)
    assert call("train_scratch", directory).returncode == 0
    with open(directory / "metrics.csv") as file:
        rows = [(float(row["test_accuracy"]), int(row["epoch"])) for row in csv.DictReader(file)]
    accuracy, epoch = max(rows)
    assert torch.load(directory / "best_model.tar", weights_only=True)["epoch"] == epoch
    assert torch.load(directory / "last_model.tar", weights_only=True)["epoch"] == 6
    assert (results(directory)["best"]["test_accuracy"], results(directory)["best"]["epoch"]) == (accuracy, epoch)
    assert results(directory)["last"]["test_accuracy"] == rows[-1][0]


def test_non_finite_values_end_the_run_and_keep_the_last_checkpoint(call, experiment):
    directory = experiment(num_epochs=4, schedule=[2], gamma=1e30)
    done = call("train_scratch", directory)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert "epoch 3, step " in line
    assert "loss" in line
    assert "gradient_norm" in line
    assert "nan" in line or "inf" in line
    for name in ("last_model.tar", "best_model.tar"):
        content = torch.load(directory / name, weights_only=True)
        assert content["epoch"] <= 2
        assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())
    assert not (directory / "results.json").exists()


    assert "stopped: epoch 3, step " in (directory / "training.log").read_text().splitlines()[-1]


def test_the_first_non_finite_step_is_found_at_the_end_of_an_epoch():
    """Checks a whole epoch at once, as on a GPU, where no step waits for its values."""
    records = [torch.tensor([1.0, 2.0]) for _ in range(5)]
    check_finite(records, ["loss", "gradient_norm"], epoch=0, first_step=1)
    records[2], records[4] = torch.tensor([math.nan, 2.0]), torch.tensor([1.0, math.inf])
    with pytest.raises(UserError, match="epoch 7, step 3: not finite: loss nan, gradient_norm 2;"):
        check_finite(records, ["loss", "gradient_norm"], epoch=6, first_step=1)


def test_bfloat16_is_chosen_by_name_and_trains(call, experiment):
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    assert choose_dtype("fp32", CPU) == torch.float32
    directory = experiment(precision="bf16", num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert results(directory)["precision"] == "bfloat16"
    weights = torch.load(directory / "last_model.tar", weights_only=True)["state_dict"]
    assert weights["conv1.weight"].dtype == torch.float32


def test_derived_seeds_depend_on_every_part():
    values = {seeds.derive_seed(*parts) for parts in ((0,), (1,), (0, "epoch", 1), (0, "epoch", 2), (0, "epoch1"))}
    assert len(values) == 5
    assert all(0 <= value < 2**63 for value in values)


def test_the_initial_weights_derive_from_the_seed(call, experiment):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        directory = experiment(name, seed=seed, num_epochs=1, learning_rate=1e-9)  # the weights hardly change
        assert call("train_scratch", directory).returncode == 0
        weights[name] = torch.load(directory / "last_model.tar", weights_only=True)["state_dict"]["fc1.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert (weights["a"] - weights["c"]).abs().max() > 0.01
