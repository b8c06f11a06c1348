"""Interrupts that wait until what must be whole is whole."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the end of the block.

    Python raises KeyboardInterrupt between any two instructions, so also between the moment when a lock is taken and
    the one when it is noted that it has to be given back. The queue of TensorBoard then waits for itself for ever.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one gets signals
        yield
        return
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if seen:
            signal.raise_signal(seen[0])
