"""The terminal: lines of the first process, and progress bars."""
from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

from utils import distributed, interrupts
from utils.errors import one_line


def print_line(text: str) -> None:
    """Print a line in the terminal of the first process, above any progress bar. Control characters are escaped."""
    if distributed.rank() == 0:
        write(one_line(text), sys.stdout)
        sys.stdout.flush()


def write(text: str, file: TextIO) -> None:
    """Print a line above any progress bar. An interrupt waits: tqdm would give back a lock that it has not taken."""
    with interrupts.deferred():
        tqdm.write(text, file=file)


def progress_bar(images: int, title: str) -> tqdm:
    """A bar that counts images; only in the first process, and only where stderr is a terminal."""
    disable = True if distributed.rank() else None
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=disable)
