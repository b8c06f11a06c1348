"""Helpers for tests of data sets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.datasets import Dataset, load_dataset
from utils.errors import UserError


def fails(name: str, data_dir: Path) -> str:
    """Message of the UserError; asserts that it is one line."""
    with pytest.raises(UserError) as error:
        load_dataset(name, data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def sound(dataset: Dataset) -> bool:
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert images.shape == (len(labels), dataset.image_size, dataset.image_size, 3)
        assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() < dataset.num_classes
    return True


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save_image(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
