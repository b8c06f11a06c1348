"""One training step: gather a batch, run the networks forward and backward, update the weights."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed
from utils.data import Batch, Draw, TrainBatches
from utils.errors import first_line

Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """The context in which networks compute in `dtype`; float32 is no context at all."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


class Step:
    """A step as it is written: each operation launched by Python in its turn. Nothing waits for the device."""

    def __init__(self, network: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batches: TrainBatches,
                 dtype: torch.dtype) -> None:
        self.network, self.loss, self.optimizer, self.batches, self.dtype = network, loss, optimizer, batches, dtype
        self.device = batches.part.labels.device
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.names: list[str] = []  # of the numbers that a step returns; known after the first

    def __call__(self, draw: Draw, size: int) -> Tensor:
        """Train on this process's share of a batch of `size` images.

        Returns float32 (K,), named by `names`: the terms of the loss and the norm of the gradient, times the share
        that this process has in their mean over all processes.
        """
        batch = self.batches.make(draw)
        with autocast(self.device, self.dtype):
            terms = self.loss(self.network, batch)
        share = distributed.world_size() * len(batch.labels) / size  # processes average gradients; batches may be odd
        (terms["loss"] * share).backward()
        # The public torch.nn.utils.get_total_norm is the same, from torch 2.6 on.
        norm = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])).norm()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.names = [*terms, "gradient_norm"]
        return torch.stack([*(value.detach().float() * share for value in terms.values()), norm.float()])


class GraphedStep:
    """A `Step` on one GPU, recorded once as a CUDA graph and replayed.

    At the batch sizes of these recipes a GPU computes faster than Python can name the hundreds of operations of a step;
    a graph names them all at once. For each size of batch the first steps run as written: they create the state of the
    optimiser, choose algorithms and compile what is to be compiled. The next one is recorded. A replay reads the draw
    from tensors of its own; a new learning rate, which is recorded as a constant, makes new graphs.
    """

    WARM_UP = 3  # steps of a size that run as written

    def __init__(self, step: Step, say: Callable[[str], None]) -> None:
        self.step, self.say = step, say
        self.stream = torch.cuda.Stream()
        self.seen: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Draw, Tensor]] = {}
        self.rates: list[float] = []
        self.recordable = True

    @property
    def names(self) -> list[str]:
        return self.step.names

    def __call__(self, draw: Draw, size: int) -> Tensor:
        rates = [group["lr"] for group in self.step.optimizer.param_groups]
        if rates != self.rates:
            self.graphs, self.rates = {}, rates
        if self.recordable and size not in self.graphs and self.seen.get(size, 0) >= self.WARM_UP:
            try:
                self.graphs[size] = self._record(draw, size)
            except RuntimeError as error:  # nothing has run: the step is still to be made
                self.recordable = False
                self.step.optimizer.zero_grad()  # gradients that were named, not computed
                self.say(f"cuda_graph: steps run as written, they cannot be recorded ({first_line(error)})")
        if size not in self.graphs:
            self.seen[size] = self.seen.get(size, 0) + 1
            return self._as_written(draw, size)
        graph, static, record = self.graphs[size]
        for name, values in draw.items():
            static[name].copy_(values)
        graph.replay()
        return record.clone()

    def _as_written(self, draw: Draw, size: int) -> Tensor:
        """On the stream of the graphs, as autograd has to have met it before a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            record = self.step(draw, size)
        torch.cuda.current_stream().wait_stream(self.stream)
        return record

    def _record(self, draw: Draw, size: int) -> tuple[torch.cuda.CUDAGraph, Draw, Tensor]:
        static = {name: values.clone() for name, values in draw.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):  # a save may be under way
            record = self.step(static, size)
        return graph, static, record


def compiled(loss: Loss, say: Callable[[str], None]) -> Loss:
    """The loss with its networks through torch.compile, or, where the compiler fails, as it is."""
    current = torch.compile(loss, dynamic=False)

    def call(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        nonlocal current
        try:
            return current(network, batch)
        except Exception as error:  # compilers raise anything
            if current is loss:
                raise
            terms = loss(network, batch)  # raises what is wrong with the loss itself
            current = loss
            say(f"compile: not used, the compiler fails ({first_line(error)})")
            return terms

    return call
