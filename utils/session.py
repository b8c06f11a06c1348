"""Record of a call of a run: device, precision, options and versions."""
from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.device import choose_dtype


def describe(device: torch.device, dtype: torch.dtype, overrides: dict[str, Any]) -> dict[str, Any]:
    """Device, processes, precision, parameters of the command line and versions, as plain values."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "torchvision": importlib.metadata.version("torchvision"), "commit": _commit()}
    return {"device": _device_name(device), "processes": distributed.world_size(),
            "precision": str(dtype).removeprefix("torch."),
            "emulated": dtype == torch.bfloat16 and choose_dtype("auto", device) != dtype,  # bfloat16, which is slow
            "set": overrides, "versions": versions}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"


def _commit() -> str | None:
    """Commit of this code, with `-dirty` if there are changes; None outside a git repository."""
    call = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(call, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    return None
