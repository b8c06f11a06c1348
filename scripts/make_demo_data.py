"""Create demo_data/: a subset of Fashion-MNIST that is small enough to ship with the code.

    python -m scripts.make_demo_data --data_dir data

Draws 1,000 training and 200 test images per class with a fixed seed from the official training and test files, and
keeps the official order. Fashion-MNIST is read from DATA_DIR/data-fashion-mnist, and downloaded there if missing. The
arrays are reproducible. Each file is an xz-compressed uint8 .npy array: images (N, 28, 28) with x before y (clothes
hang vertically, so this is a few percent smaller), labels (N,).
"""

import argparse
import lzma

import numpy as np

from utils.cli import main
from utils.datasets import DEMO_DIR, load_dataset

TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200
# Literal context of four bits: neighboring gray values mostly agree in their upper bits only.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def choose(labels: np.ndarray, per_class: int, random: np.random.RandomState) -> np.ndarray:
    """Sorted indices of `per_class` random images of each class."""
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def write(name: str, values: np.ndarray) -> None:
    path = DEMO_DIR / f"{name}.npy.xz"
    with lzma.open(path, "wb", filters=FILTERS) as file:
        np.save(file, np.ascontiguousarray(values))
    print(f"{path}: {values.shape}, {path.stat().st_size:,} bytes")


def make_demo_data() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="directory that contains data-fashion-mnist (default: data)")
    dataset = load_dataset("fashion_mnist", parser.parse_args().data_dir)
    random = np.random.RandomState(0)  # NumPy guarantees that the stream of this generator never changes
    DEMO_DIR.mkdir(exist_ok=True)
    for part, images, labels, per_class in (
        ("train", dataset.train_images, dataset.train_labels, TRAIN_PER_CLASS),
        ("test", dataset.test_images, dataset.test_labels, TEST_PER_CLASS),
    ):
        chosen = choose(labels.numpy(), per_class, random)
        write(f"{part}_images", images.numpy()[chosen, 2:-2, 2:-2, 0].transpose(0, 2, 1))
        write(f"{part}_labels", labels.numpy()[chosen].astype(np.uint8))


if __name__ == "__main__":
    main(make_demo_data)
