"""Memory allocator settings for CPUs."""
from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3), of malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the tensors of the next step.

    By default, glibc returns every freed block of more than 32 MiB to the system, and the next step waits for new,
    zeroed pages: up to a third of its time (docs/benchmarks.md). No effect if the user has configured the allocator
    (MALLOC_*, GLIBC_TUNABLES) or if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
