"""Diagnosis of a vaccine, compared with counts by hand."""
import dataclasses
import math

import pytest
import torch
from torch import nn

from datafree.diagnosis import auc, diagnose, reestimate_batch_norms
from utils.data import Images


def test_the_area_under_the_curve_counts_pairs_and_halves_ties():
    positive, negative = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    assert auc(positive, negative) == pytest.approx((3 + 1.5) / 6)
    assert auc(negative, positive) == pytest.approx(1 - 4.5 / 6)


class Says(nn.Module):
    """Predicts the class stored in one color channel of the first pixel."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, images):
        return nn.functional.one_hot(images[:, self.channel, 0, 0].long(), 3).float()


def part(*pixels):
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 3)
    return Images(images, torch.zeros(len(images), dtype=torch.int64), torch.zeros(3), torch.full((3,), 1 / 255))


def test_the_diagnosis_covers_clean_and_triggered_images():
    report = diagnose(Says(0), Says(1), part((0, 1, 0), (1, 1, 0), (2, 1, 0), (0, 2, 0)), part((2, 2, 0), (1, 1, 0)),
                      torch.float32)
    assert report["suspicious_clean"] == 25
    assert report["suspicious_triggered"] == 100
    assert report["k_triggered"] == pytest.approx(0, abs=1e-7)
    assert report["k_clean"] == pytest.approx(3 / 4 * (math.e - 1) / (math.e + 2) / 3)
    assert report["auc"] == pytest.approx((3 + 0.5) / 4)  # three clean images differ, one ties
    assert report["shuffled_classes"] == [0, 75, 25]


def test_without_triggered_images_the_diagnosis_covers_clean_images():
    clean = part((0, 1, 0), (1, 1, 0))
    report = diagnose(Says(0), Says(1), clean, dataclasses.replace(clean, images=clean.images[:0],
                                                                   labels=clean.labels[:0]), torch.float32)
    assert report.keys() == {"k_clean", "suspicious_clean", "shuffled_classes"}


def test_batch_norms_of_a_copy_get_the_mean_statistics_of_the_first_batches():
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.1)).eval()
    network[0].running_mean.fill_(100)
    drawn = []

    def endless():
        while True:
            drawn.append(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(len(drawn))) + len(drawn))
            yield drawn[-1]

    copied, = reestimate_batch_norms(network, endless(), torch.float32, batches=5)
    assert len(drawn) == 5
    torch.testing.assert_close(copied.running_mean, torch.stack(drawn).mean((0, 1, 3, 4)))
    torch.testing.assert_close(copied.running_var, torch.stack([images.var((0, 2, 3)) for images in drawn]).mean(0))
    assert copied.momentum == 0.1 and not copied.training
    assert network[0].running_mean.tolist() == [100] * 3 and network[0].num_batches_tracked == 0
    with pytest.raises(ValueError, match="no images"):
        reestimate_batch_norms(network, [], torch.float32)
