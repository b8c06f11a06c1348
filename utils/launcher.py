"""Whether this process is one of several, and how several are started: all that can be known without torch."""
from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import NoReturn


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "LOCAL_RANK" in os.environ


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def launch(processes: int) -> NoReturn:
    """Run this command line on `processes` processes of this machine, as torchrun does; exit as the first that fails.

    torchrun itself reports a failed process with a page of traceback, under which the one line of an error drowns.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = []
    for number in range(processes):
        own = {name: str(value) for name, value in {**shared, "RANK": number, "LOCAL_RANK": number}.items()}
        workers.append(subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **own}))
    try:
        while not (failed := [worker.returncode for worker in workers if worker.poll()]) and \
                any(worker.returncode is None for worker in workers):
            time.sleep(0.1)
    except KeyboardInterrupt:  # the terminal has told the workers too
        failed = [130]
    finally:
        end = time.monotonic() + 5  # those that fail alike say so first; one that waits for a lost one never ends
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0, end - time.monotonic()))
            worker.terminate()
            worker.wait()
    sys.exit(failed[0] if failed else 0)
