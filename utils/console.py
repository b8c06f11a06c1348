"""Terminal output of the first process: lines and progress bars."""
from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

from utils import distributed, interrupts
from utils.errors import one_line


def print_line(text: str) -> None:
    """Print a line, in the first process only, above any progress bar. Control characters are escaped."""
    if distributed.rank() == 0:
        write(one_line(text), sys.stdout)
        sys.stdout.flush()


def write(text: str, file: TextIO) -> None:
    """Print a line above any progress bar. Defers interrupts, which could make tqdm release a lock it does not hold."""
    with interrupts.deferred():
        tqdm.write(text, file=file)


def progress_bar(images: int, title: str) -> tqdm:
    """Progress bar that counts images; shown in the first process only, and only if stderr is a terminal."""
    disable = True if distributed.rank() else None
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=disable)
