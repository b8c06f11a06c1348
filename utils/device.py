"""What a device is set up for, and the arithmetic that it is fast at."""
from __future__ import annotations

import platform
from pathlib import Path

import torch

from utils.allocator import keep_freed_memory


def prepare_device(device: torch.device, precision: str) -> None:
    """Settings of this process that the speed on a device, and the float32 of a GPU, depend on."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    else:
        keep_freed_memory()


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the networks. `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    native = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else _cpu_multiplies_bfloat16()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"}) or (platform.machine() == "aarch64" and "bf16" in words)
