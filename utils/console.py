"""The terminal: lines of the first process, and progress bars."""
from __future__ import annotations

import sys

from tqdm import tqdm

from utils import distributed
from utils.errors import one_line


def say(text: str) -> None:
    """Print a line in the terminal of the first process, above any progress bar. Control characters are escaped."""
    if distributed.rank() == 0:
        tqdm.write(one_line(text), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(images: int, title: str) -> tqdm:
    """A bar that counts images; only in the first process, and only where stderr is a terminal."""
    disable = True if distributed.rank() else None
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=disable)
