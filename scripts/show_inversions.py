"""Draw inverted images of several teachers (DeepInversion or CMI), class by class, beside test images.

    python scripts/show_inversions.py experiments/demo/kd_normal_net16/deepinversion_net16 \\
        experiments/demo/kd_nasty_net16/deepinversion_net16 --out inversions.png

Draws the newest images of each class from the pool in last_model.tar: one row per class, one block per directory.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.stages import recorded_params
from utils import checkpoint
from utils.cli import main
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.image_folder import Decoding

ZOOM, GAP, HEAD, LABEL_WIDTH, TEXT = 3, 4, 44, 130, 14  # ZOOM: canvas pixels per image pixel; others in canvas pixels
COLUMNS, REAL_COLUMNS, ROWS = 6, 3, 10


class Block(NamedTuple):
    """Images side by side: head of two lines, images uint8 (N, H, W, 3), labels (N,), and images drawn per class."""

    head: str
    images: Tensor
    labels: Tensor
    columns: int


def show_inversions() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR",
                        help="run directories of deepinversion or cmi")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets (default: data)")
    parser.add_argument("--out", type=Path, default=Path("inversions.png"), metavar="FILE",
                        help="output file (default: inversions.png)")
    arguments = parser.parse_args()
    blocks: list[Block] = []
    for directory in arguments.directories:
        content = checkpoint.load(directory / "last_model.tar", "the experiment").content
        kept = content.get("learner", content)  # earlier versions stored the pool at the top level
        if "pool" not in kept:
            raise UserError(f"{directory}: its method stores no images: give runs of deepinversion or cmi")
        if not blocks:
            params = content["params"]
            decoding = Decoding(params["image_size"], params.get("background", "white"),
                                params.get("interpolation", "bilinear"))
            dataset = load_dataset(params["dataset"], arguments.data_dir, decoding, training=False)
            blocks.append(Block(f"{dataset.name}\ntest images", dataset.test_images, dataset.test_labels, REAL_COLUMNS))
        pool = kept["pool"]
        if tuple(content["data"]["classes"]) != dataset.classes or pool["images"].shape[1] != dataset.image_size:
            raise UserError(f"{directory} has other images or classes than {params['dataset']}")
        head = f'{_teacher(content)}\n{content["params"]["method"]}, {"/".join(directory.parts[-2:])}'
        blocks.append(Block(head, pool["images"].cpu(), pool["labels"].cpu(), COLUMNS))
    draw(blocks, dataset.classes).save(arguments.out, format="PNG")
    print(f"inverted images, class by class: {arguments.out}")


def _teacher(content: dict[str, Any]) -> str:
    """Head line of a block: kind of the teacher, and accuracy of its student in percent."""
    source, kind = content["sources"]["teacher"], None
    if Path(source["path"]).is_file():
        teacher = checkpoint.load(source["path"], "teacher")
        if teacher.sha256 == source["sha256"] and "stage" in teacher.content:
            kind = recorded_params(teacher.content["stage"], teacher.content["params"]).description.kind
    student = content["history"][-1]["test_accuracy"]
    return " ".join(filter(None, ["from a", kind, f"teacher; accuracy of its student: {student:.1f} %"]))


def draw(blocks: Sequence[Block], classes: Sequence[str]) -> Image.Image:
    """Image grid with one row for each of the first `ROWS` classes."""
    side = ZOOM * blocks[0].images.shape[1]
    rows = min(ROWS, len(classes))
    widths = [block.columns * (side + GAP) + 4 * GAP for block in blocks]
    canvas = Image.new("RGB", (LABEL_WIDTH + sum(widths), HEAD + rows * (side + GAP)), "white")
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    left = LABEL_WIDTH
    for block, width in zip(blocks, widths, strict=True):
        text.text((left, GAP), block.head, fill="black", font=font)
        for row in range(rows):
            top = HEAD + row * (side + GAP)
            text.text((GAP, top + (side - TEXT) // 2), classes[row], fill="black", font=font)
            for column, number in enumerate((block.labels == row).nonzero()[-block.columns:, 0]):
                tile = Image.fromarray(block.images[number].numpy()).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + column * (side + GAP), top))
        left += width
    return canvas


if __name__ == "__main__":
    main(show_inversions)
