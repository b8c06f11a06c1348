"""One run on several processes (torchrun): the global batch is shared out, the result is that of one process.

Outside torchrun every function here does nothing.
"""
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def relaunch(processes: int) -> None:
    """Replace this process by torchrun with the same command line on `processes` processes."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc_per_node={processes}", *sys.argv])


def initialise(device: torch.device) -> None:
    """Join the process group if torchrun started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process do the block before all others."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network for training on this process: gradients averaged and batch statistics taken over all processes.

    Names of the state dict do not change in `.module`, which is the network to evaluate and to save.
    """
    if not dist.is_initialized():
        return network
    network = _synchronise_batch_norm(network, device)
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)


def _synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(network, name, _SyncBatchNorm.from_batch_norm(child))
        else:
            _synchronise_batch_norm(child, device)
    return network


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is its gradient, since the loss of every process depends on it."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all processes on the CPU, where torch's own refuses to run."""

    @classmethod
    def from_batch_norm(cls, other: nn.modules.batchnorm._BatchNorm) -> _SyncBatchNorm:
        new = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        new.__dict__["_parameters"], new.__dict__["_buffers"] = other._parameters, other._buffers
        return new

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # 2-D and 4-D alike

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float() if x.dtype != torch.float64 else x
        count = sum_over_ranks(torch.tensor(float(x.numel() / x.size(1)), dtype=wide.dtype))
        mean = _Sum.apply(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
