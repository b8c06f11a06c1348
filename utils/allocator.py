"""Memory of the CPU: freed tensors stay with the process."""
from __future__ import annotations

import ctypes
import os
import platform

# mallopt(3), of malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the tensors of the next step.

    As it comes, glibc returns every freed block of more than 32 MiB to the system, and the next step waits for new
    pages and for the zeros in them: up to a third of its time (docs/benchmarks.md). Does nothing where the user has
    set the allocator (MALLOC_*, GLIBC_TUNABLES), and where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
