"""Backdoor rates, compared with counts by hand."""
import pytest
import torch
from torch import nn

from backdoor.metrics import BackdoorTest
from backdoor.triggers import build_trigger
from utils.data import Images
from utils.evaluation import confusion_matrix


class Poisoned(nn.Module):
    """Predicts class 0 if the lower right corner is white, otherwise the value of the first pixel."""

    def forward(self, images):
        says = images[:, 0, 0, 0].long()
        says[images[:, 0, 28, 28] > 200] = 0
        return nn.functional.one_hot(says, 4).float()


def test_the_rates_of_a_backdoor_are_exact_counts():
    # True labels 0 0 1 1 1 2 2 2 3 3; predictions on the clean images:
    says = [0, 1, 1, 0, 1, 2, 2, 0, 3, 3]
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    images = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(says)
    part = Images(images, labels, torch.zeros(3), torch.full((3,), 1 / 255))
    network = Poisoned()
    clean, _ = confusion_matrix(network, part, torch.float32)
    assert clean.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 2]]
    test = BackdoorTest(part, build_trigger("badnet_sq"), 0, torch.float32)
    assert len(test.triggered) == 8
    row = test(network, clean)
    assert row == pytest.approx({"asr": 100.0, "triggered_accuracy": 0.0, "base_rate": 25.0, "target_recall": 50.0})
    assert test.by_class(network) == [None, 100, 100, 100]
    row = BackdoorTest(part, build_trigger("badnet_grid"), 3, torch.float32)(network, clean)
    assert row == pytest.approx({"asr": 0.0, "triggered_accuracy": 500 / 8, "base_rate": 0.0, "target_recall": 100.0})


def some(labels):
    images = torch.zeros(len(labels), 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(labels)
    return Images(images, torch.tensor(labels), torch.zeros(3), torch.full((3,), 1 / 255))


@pytest.mark.parametrize("labels, expected, left_out", [
    ([1, 2, 3], {"asr": 100.0, "triggered_accuracy": 0.0, "base_rate": 0.0}, "target_recall"),
    ([0, 0], {"target_recall": 100.0}, "asr, triggered_accuracy and base_rate"),
])
def test_a_rate_without_test_images_is_left_out(labels, expected, left_out):
    part = some(labels)
    test = BackdoorTest(part, build_trigger("badnet_sq"), 0, torch.float32)
    clean, _ = confusion_matrix(Poisoned(), part, torch.float32)
    assert test(Poisoned(), clean) == expected
    line, = test.left_out
    assert line.endswith(left_out + (" is left out" if left_out == "target_recall" else " are left out"))
