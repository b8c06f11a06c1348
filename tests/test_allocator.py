"""Freed CPU memory stays with the process."""
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
from pathlib import Path
import torch
from utils.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

keep_freed_memory()
before = resident()
tensor = torch.ones(2**26)
del tensor
print((resident() - before) / 2**28)
"""


def share_kept(**environment):
    """Memory that the process still holds after using and freeing 256 MiB."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=inherited | environment, check=True,
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_with_the_process_unless_the_user_has_set_the_allocator():
    assert share_kept() > 0.9
    assert share_kept(MALLOC_MMAP_THRESHOLD_="1000000") < 0.1
