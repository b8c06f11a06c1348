"""Detection and launch of several processes. Imports no torch."""
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
    """Number of processes on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def launch(processes: int) -> NoReturn:
    """Run this command line in several processes on this machine, like torchrun; exit with the first nonzero status.

    torchrun itself prints a long traceback for a failed process, which hides the one-line error.
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
    except KeyboardInterrupt:  # the terminal sends it to the workers too
        failed = [130]
    finally:
        end = time.monotonic() + 5  # others may still print an error; one that waits for a dead one would not end
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0, end - time.monotonic()))
            worker.terminate()
            worker.wait()
    sys.exit(failed[0] if failed else 0)
