"""Draw all triggers: one row per trigger, stamped on test images of different classes.

    python scripts/show_triggers.py --dataset demo --out triggers.png

The last column is the change of the last image, amplified three times, on gray.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backdoor.triggers import TRIGGER_NAMES, build_trigger
from utils.cli import main
from utils.datasets import DATASETS, Dataset, load_dataset

ZOOM, GAP, LABEL_WIDTH = 3, 4, 90  # ZOOM: canvas pixels per image pixel; others in canvas pixels
COLUMNS = 6


def show_triggers() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo", help=f"{', '.join(DATASETS)} or folder:PATH (default: demo)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets (default: data)")
    parser.add_argument("--out", type=Path, default=Path("triggers.png"), metavar="FILE",
                        help="output file (default: triggers.png)")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.dataset, arguments.data_dir, training=False)
    images = examples(dataset)
    rows: list[tuple[str, Tensor, Tensor | None]] = [("original", images, None)]
    for name in TRIGGER_NAMES:
        stamped = build_trigger(name, dataset.name).stamp(images)
        change = stamped[-1].int() - images[-1].int()
        rows.append((name, stamped, (128 + 3 * change).clamp_(0, 255).byte()))
    draw(rows).save(arguments.out, format="PNG")
    print(arguments.out)


def examples(dataset: Dataset) -> Tensor:
    """First test image of each of the first `COLUMNS` classes: uint8 (n, H, W, 3)."""
    _, first = torch.unique(dataset.test_labels, return_inverse=True)
    return torch.stack([dataset.test_images[(first == i).nonzero()[0, 0]]
                        for i in range(min(COLUMNS, int(first.max()) + 1))])


def draw(rows: list[tuple[str, Tensor, Tensor | None]]) -> Image.Image:
    """Image grid of rows: name, images uint8 (n, H, W, 3), and optional change uint8 (H, W, 3)."""
    side = ZOOM * rows[0][1].shape[1]
    columns = len(rows[0][1]) + 1
    canvas = Image.new("RGB", (LABEL_WIDTH + columns * (side + GAP), len(rows) * (side + GAP)), "white")
    text = ImageDraw.Draw(canvas)
    for i, (name, images, change) in enumerate(rows):
        top = i * (side + GAP)
        text.text((GAP, top + side // 2 - 6), name, fill="black")
        for j, image in enumerate([*images, change]):
            if image is not None:
                tile = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (LABEL_WIDTH + j * (side + GAP), top))
    return canvas


if __name__ == "__main__":
    main(show_triggers)
