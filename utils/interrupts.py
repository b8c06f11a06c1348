"""Defer SIGINT and SIGTERM during a critical section, and find interrupts that a library hid behind another error."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block.

    Python raises KeyboardInterrupt between any two instructions, so possibly after a lock is acquired and before its
    release is ensured. The queue of TensorBoard then deadlocks.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
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
    """KeyboardInterrupt among an error, its causes and contexts; None if there is none.

    An interrupt can make the cleanup code of a library fail: torch, for example, pops a mode that is not on its stack,
    which raises a RuntimeError.
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
