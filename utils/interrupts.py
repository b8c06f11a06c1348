"""Interrupts that wait until what must be whole is whole, and those that a library hides behind an error of its own."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deferred() -> Iterator[None]:
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


def find_interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interrupt because of which an error was raised, or while it was handled; the error itself if it is one.

    An interrupt stops libraries anywhere, and what they tidy up then can fail: torch takes a mode off its stack that is
    not on it at that moment, which is a RuntimeError. The user has interrupted the run all the same.
    """
    links, seen = [error], set[int]()
    while links:
        link = links.pop()
        if isinstance(link, KeyboardInterrupt):
            return link
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            links += [link.__context__, link.__cause__]
    return None
