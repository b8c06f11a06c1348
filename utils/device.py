"""Selection and setup of a process's device, and the floating-point type that it is fast at."""
from __future__ import annotations

import platform
from pathlib import Path

import torch

from utils import launcher
from utils.allocator import keep_freed_memory
from utils.errors import UserError


def choose_device(device: str, gpu_ids: list[int] | None, cuda: bool) -> torch.device:
    """Select the device of this process; with several GPUs, start one process for each. Raises UserError if a device
    does not exist or the options contradict each other.

    cuda: parameter `cuda`; false means the CPU, unless the command line asks for a GPU.
    """
    if gpu_ids and device not in ("auto", "cuda"):
        raise UserError(f"--gpu_id and --device {device} contradict each other")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and not gpu_ids:
        device = "cuda" if cuda and found else "cpu"
    elif device == "auto":
        device = "cuda"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda" and not (device.startswith("cuda:") and device[5:].isdigit()):
        raise UserError(f"--device {device}: choose auto, cpu, cuda or cuda:N")
    ids = gpu_ids or ([int(device[5:])] if ":" in device else list(range(launcher.local_size())))
    asked = f"--gpu_id {' '.join(map(str, gpu_ids))}" if gpu_ids else f"--device {device}"
    if launcher.local_size() > len(ids):
        raise UserError(f"{asked}: torchrun started {launcher.local_size()} processes for {len(ids)} GPU(s)")
    if not found:
        raise UserError(f"{asked}: no CUDA device is available (torch {torch.__version__}): use --device cpu")
    if len(set(ids)) < len(ids):
        raise UserError(f"{asked}: a GPU is given twice")
    if missing := [number for number in ids if not 0 <= number < found]:
        raise UserError(f"{asked}: GPU {missing[0]} does not exist, there are {found}, counted from 0")
    if launcher.launched():
        return torch.device("cuda", ids[launcher.local_rank()])
    if len(ids) > 1:
        launcher.launch(len(ids))
    return torch.device("cuda", ids[0])


def prepare_device(device: torch.device, precision: str) -> None:
    """Set cuDNN and TF32 options (GPU) or the memory allocator (CPU) of this process."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    else:
        keep_freed_memory()


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Floating-point type of the networks. `auto`: bfloat16 if the device multiplies it natively, else float32."""
    native = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else _cpu_multiplies_bfloat16()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"}) or (platform.machine() == "aarch64" and "bf16" in words)
