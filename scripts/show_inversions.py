"""What two teachers dream of, side by side: images that DeepInversion or CMI made for each class.

    python scripts/show_inversions.py experiments/demo/kd_normal_net16/deepinversion_net16 \\
        experiments/demo/kd_nasty_net16/deepinversion_net16 --out inversions.png

Takes the newest of each class from the pool in last_model.tar of each directory: a row a class, a block a directory.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import checkpoint
from utils.cli import main
from utils.errors import UserError

ZOOM, GAP, HEAD, LABEL_WIDTH = 3, 4, 20, 110  # pixels on the picture for one of the image; pixels
COLUMNS, ROWS = 6, 10


def show_inversions() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="experiments of these methods")
    parser.add_argument("--out", type=Path, default=Path("inversions.png"), metavar="FILE",
                        help="default: inversions.png")
    arguments = parser.parse_args()
    blocks, classes = [], []
    for directory in arguments.directories:
        content = checkpoint.load(directory / "last_model.tar", "the experiment").content
        if "pool" not in content:
            raise UserError(f"{directory}: its method keeps no images; deepinversion and cmi do")
        blocks.append((directory, content["pool"]["images"], content["pool"]["labels"]))
        if blocks[0][1].shape[1:] != blocks[-1][1].shape[1:] or classes not in ([], content["data"]["classes"]):
            raise UserError(f"{directory} has other images or classes than {arguments.directories[0]}")
        classes = content["data"]["classes"]
    draw(blocks, classes).save(arguments.out, format="PNG")
    print(arguments.out)


def draw(blocks: list[tuple[Path, Tensor, Tensor]], classes: list[str]) -> Image.Image:
    """Directory, images uint8 (N, H, W, 3) and their classes (N,) of each block."""
    side = ZOOM * blocks[0][1].shape[1]
    width = COLUMNS * (side + GAP) + 4 * GAP
    rows = min(ROWS, len(classes))
    canvas = Image.new("RGB", (LABEL_WIDTH + len(blocks) * width, HEAD + rows * (side + GAP)), "white")
    text = ImageDraw.Draw(canvas)
    for block, (directory, images, labels) in enumerate(blocks):
        left = LABEL_WIDTH + block * width
        text.text((left, GAP), "/".join(directory.parts[-2:]), fill="black")
        for row in range(rows):
            top = HEAD + row * (side + GAP)
            text.text((GAP, top + side // 2 - 6), classes[row], fill="black")
            for column, number in enumerate((labels == row).nonzero()[-COLUMNS:, 0]):
                tile = Image.fromarray(images[number].cpu().numpy()).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + column * (side + GAP), top))
    return canvas


if __name__ == "__main__":
    main(show_inversions)
