"""One run on several processes (torchrun): they split each batch, and the result equals that of one process.

In a single process, rank() is 0, world_size() is 1, and nothing is communicated.
"""
from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import launcher
from utils.errors import UserError
from utils.memory import Phase


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def initialize(device: torch.device) -> None:
    """Join the process group if torchrun or `launcher.launch` started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launcher.launched():
        cuda = device.type == "cuda"
        timeout = datetime.timedelta(hours=2)  # one process may download or decode while the others wait
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)


def shut_down() -> None:
    """Leave the process group together: one whose peers have gone can wait forever (seen with gloo of torch 2.4)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def synchronized_errors(*, rank_zero_first: bool = False) -> Iterator[None]:
    """Context that all processes leave together, and in which an error of one process is raised in all.

    A run then ends with one line, whichever process had the error. rank_zero_first: the first process runs the block
    before the others enter it.
    """
    if rank_zero_first and rank():
        _raise_on_all(None)
    error = None
    try:
        with Phase():
            yield
    except UserError as caught:
        error = caught
    except OSError as caught:
        if caught.errno is None:
            raise
        error = UserError.from_os(caught)
    message = str(error) if error else None
    error = None  # its traceback would keep this frame and all that it references alive
    if rank_zero_first and not rank():
        _raise_on_all(message)
    _raise_on_all(message)


def _raise_on_all(message: str | None) -> None:
    """Raise UserError in all processes if any of them has a message."""
    messages = [message]
    if dist.is_initialized():
        messages *= dist.get_world_size()
        dist.all_gather_object(messages, message)
    if message := message or next(filter(None, messages), None):
        raise UserError(message)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a network so that gradients are averaged and batch statistics computed over all processes.

    `.module` is the network to evaluate and save; the names of its state dict do not change.
    """
    if not dist.is_initialized():
        return network
    network = _synchronize_batch_norm(network, device)
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)


def _synchronize_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(network, name, _SyncBatchNorm.from_batch_norm(child))
        else:
            _synchronize_batch_norm(child, device)
    return network


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes. The gradient is summed too, since the loss of every process depends on the sum."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over all processes on the CPU; torch.nn.SyncBatchNorm needs a GPU."""

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
        mean = _AllReduceSum.apply(wide.sum(dims)) / count
        centered = wide - mean.view(shape)
        variance = _AllReduceSum.apply(centered.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
