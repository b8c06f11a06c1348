"""One training step: gather a batch, run the networks forward and backward, update the weights."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import distributed, interrupts
from utils.convolution import fast_convolutions
from utils.data import Batch, Draw, TrainBatches
from utils.errors import first_line
from utils.memory import OutOfMemory, Phase

# What a stage minimises: the terms of a batch by name, `loss` among them, each a tensor of one number. A step may be
# recorded and replayed, so a loss computes from its arguments and from tensors that are changed in place alone, never
# from values of Python that change between steps, and does not wait for the device.
Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """The context in which networks compute in `dtype`; float32 is no context at all."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Context in which a network is in eval mode: no dropout, and running statistics stay. Gives the network, without
    the wrapper that several processes have around it."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield unwrapped(network)
    finally:
        for module, mode in modes.items():
            module.training = mode


def unwrapped(network: nn.Module) -> nn.Module:
    """The network without the wrapper that several processes have around it."""
    if isinstance(network, DistributedDataParallel):
        inner: nn.Module = network.module
        return inner
    return network


class Step:
    """A step as it is written: each operation launched by Python in its turn. Nothing waits for the device."""

    def __init__(self, network: nn.Module, loss: Loss, optimizers: Sequence[torch.optim.Optimizer],
                 batches: TrainBatches, dtype: torch.dtype, method: nn.Module | None = None) -> None:
        """optimizers: that of the network and, maybe, one of the loss's own parameters. method: the module of those."""
        self.method = method or nn.Module()
        self.network, self.loss, self.optimizers, self.batches, self.dtype = network, loss, optimizers, batches, dtype
        self.device = batches.part.labels.device
        self.parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups
                           for parameter in group["params"]]
        self.convolutions = fast_convolutions(self.device, dtype)
        self.names: list[str] = []  # of the numbers that a step returns; known after the first

    def __call__(self, draw: Draw, size: int) -> Tensor:
        """Train on this process's share of a batch of `size` images.

        Returns float32 (K,), named by `names`: the terms of the loss and the norm of the gradient, times the share
        that this process has in their mean over all processes.
        """
        batch = self.batches.gather(draw)
        share = distributed.world_size() * len(batch.index) / size  # processes average gradients; batches may be odd
        terms = self.differentiate(self.loss, batch, share)
        # The public torch.nn.utils.get_total_norm is the same, from torch 2.6 on.
        norm = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])).norm()
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()
        self.names = [*terms, "gradient_norm"]
        return torch.stack([*(value.detach().float() * share for value in terms.values()), norm.float()])

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def differentiate(self, loss: Loss, batch: Batch, share: float) -> dict[str, Tensor]:
        """The terms of the loss, and their gradient in the parameters."""
        with autocast(self.device, self.dtype), self.convolutions:
            terms = loss(self.network, batch)
        (terms["loss"] * share).backward()
        return terms


class CompiledStep(Step):
    """A step whose networks go through torch.compile, or, where the compiler fails, as it is written."""

    def __init__(self, *arguments: Any, log: Callable[[str], None]) -> None:
        super().__init__(*arguments)
        self.log = log
        self.convolutions, self.eager_convolutions = nullcontext(), self.convolutions  # the compiler has its own
        self.compiled = torch.compile(self.loss, dynamic=False)
        self.compiled_sizes: set[int] = set()  # sizes of batches, for each of which the compiler is called anew

    def differentiate(self, loss: Loss, batch: Batch, share: float) -> dict[str, Tensor]:
        size = len(batch.index)
        if self.compiled is loss or size in self.compiled_sizes:
            return super().differentiate(self.compiled, batch, share)
        before = [(buffer, buffer.clone()) for module in (self.network, self.method) for buffer in module.buffers()]
        state = _random_state(self.device)
        try:  # forward and backward, which is compiled when it is first called
            with Phase():
                terms = super().differentiate(self.compiled, batch, share)
            self.compiled_sizes.add(size)
            return terms
        except OutOfMemory:
            raise
        except Exception as error:  # compilers raise anything
            if interrupts.find_interrupt(error):  # the user wants an end, not another form of the step
                raise
            failure = first_line(error)
        self.zero_grad()
        for buffer, value in before:
            buffer.copy_(value)
        _set_random_state(self.device, state)
        self.convolutions = self.eager_convolutions
        terms = super().differentiate(loss, batch, share)  # raises what is wrong with the loss itself
        self.compiled = loss
        self.log(f"compile: not used, the compiler fails ({failure})")
        return terms


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class GraphedStep:
    """A `Step` on one GPU, recorded once as a CUDA graph and replayed.

    At the batch sizes of these recipes a GPU computes faster than Python can name the hundreds of operations of a step;
    a graph names them all at once. For each size of batch the first steps run as written: they create the state of the
    optimiser, choose algorithms and compile what is to be compiled. The next one is recorded. A replay reads the draw
    from tensors of its own; the learning rate is recorded as a constant, so a new one, as some epochs begin with, makes
    new graphs.
    """

    WARM_UP = 3  # steps of a size that run as written

    def __init__(self, step: Step, log: Callable[[str], None]) -> None:
        self.step, self.log = step, log
        self.stream = torch.cuda.Stream()
        self.seen: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Draw, Tensor]] = {}
        self.rates: list[float] = []
        self.recordable = True

    @property
    def names(self) -> list[str]:
        return self.step.names

    def __call__(self, draw: Draw, size: int) -> Tensor:
        rates = [group["lr"] for optimizer in self.step.optimizers for group in optimizer.param_groups]
        if rates != self.rates:
            self.graphs, self.rates = {}, rates
        if self.recordable and size not in self.graphs and self.seen.get(size, 0) >= self.WARM_UP:
            self._record(draw, size)
        if size not in self.graphs:
            self.seen[size] = self.seen.get(size, 0) + 1
            return self._run_eager(draw, size)
        graph, static, record = self.graphs[size]
        for name, values in draw.items():
            static[name].copy_(values)
        graph.replay()
        return record.clone()

    def _run_eager(self, draw: Draw, size: int) -> Tensor:
        """On the stream of the graphs, as autograd has to have met it before a recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            record = self.step(draw, size)
        torch.cuda.current_stream().wait_stream(self.stream)
        return record

    def _record(self, draw: Draw, size: int) -> None:
        static = {name: values.clone() for name, values in draw.items()}
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                record = self.step(static, size)
        except RuntimeError as error:  # nothing has run: the step is still to be made
            if interrupts.find_interrupt(error):  # the user wants an end, not another form of the step
                raise
            torch.cuda.set_stream(current)  # older torch leaves that of the recording
            self.step.zero_grad()  # gradients that were named, not computed
            self.recordable = False
            reason = error.__context__ or error  # the end of a spoilt recording complains too
            self.log(f"cuda_graph: steps run as written, they cannot be recorded ({first_line(reason)})")
            return
        self.graphs[size] = graph, static, record
