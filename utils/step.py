"""Training step: gather a batch, forward and backward pass, optimizer step."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import distributed, interrupts
from utils.convolution import fast_convolutions
from utils.data import Batch, Draw, TrainBatches
from utils.errors import first_line
from utils.memory import OutOfMemory, Phase

# Loss of a stage: (network, batch) -> scalar tensors by name, of which `loss` is minimized. A step may be recorded as a
# CUDA graph, so a loss computes only from its arguments and from tensors that are updated in place, never from Python
# values that change between steps, and does not wait for the device.
Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast context for `dtype`; disabled for float32.

    Weights that were cast inside are cached until it ends. It begins and ends within a step, so a recorded step casts
    the present weights in each replay.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[nn.Module]:
    """Context in which a network is in eval mode. Yields the network without its DistributedDataParallel wrapper."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield unwrapped(network)
    finally:
        for module, mode in modes.items():
            module.training = mode


def unwrapped(network: nn.Module) -> nn.Module:
    """The network without its DistributedDataParallel wrapper."""
    if isinstance(network, DistributedDataParallel):
        inner: nn.Module = network.module
        return inner
    return network


class Step:
    """Eager training step, which never waits for the device."""

    def __init__(self, network: nn.Module, loss: Loss, optimizers: Sequence[torch.optim.Optimizer],
                 batches: TrainBatches, dtype: torch.dtype, method: nn.Module | None = None) -> None:
        """optimizers: that of the network and optionally that of the loss's parameters. method: module with these."""
        self.method = method or nn.Module()
        self.network, self.loss, self.optimizers, self.batches, self.dtype = network, loss, optimizers, batches, dtype
        self.device = batches.part.labels.device
        self.parameters = [parameter for optimizer in optimizers for group in optimizer.param_groups
                           for parameter in group["params"]]
        self.convolutions = fast_convolutions(self.device, dtype)
        self.names: list[str] = []  # of the values that a step returns; known after the first

    def __call__(self, draw: Draw, size: int) -> Tensor:
        """Train on this process's share of a batch of `size` images.

        Returns float32 (K,), named by `names`: the terms of the loss and the gradient norm, weighted so that their mean
        over all processes is that of the batch.
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
        """Compute the terms of the loss, and accumulate the gradient in the parameters."""
        with autocast(self.device, self.dtype), self.convolutions:
            terms = loss(self.network, batch)
        (terms["loss"] * share).backward()
        return terms


class CompiledStep(Step):
    """Step with torch.compile; falls back to the eager step if the compiler fails."""

    def __init__(self, *arguments: Any, log: Callable[[str], None]) -> None:
        super().__init__(*arguments)
        self.log = log
        self.convolutions, self.eager_convolutions = nullcontext(), self.convolutions  # the compiler brings its own
        self.compiled = torch.compile(self.loss, dynamic=False)
        self.compiled_sizes: set[int] = set()  # batch sizes, each of which is compiled separately

    def differentiate(self, loss: Loss, batch: Batch, share: float) -> dict[str, Tensor]:
        size = len(batch.index)
        if self.compiled is loss or size in self.compiled_sizes:
            return super().differentiate(self.compiled, batch, share)
        before = [(buffer, buffer.clone()) for module in (self.network, self.method) for buffer in module.buffers()]
        state = _random_state(self.device)
        try:  # both passes, since the backward is compiled on its first call
            with Phase():
                terms = super().differentiate(self.compiled, batch, share)
            self.compiled_sizes.add(size)
            return terms
        except OutOfMemory:
            raise
        except Exception as error:  # compilers raise anything
            if interrupts.find_interrupt(error):  # an interrupt, not a failure of the compiler
                raise
            failure = first_line(error)
        self.zero_grad()
        for buffer, value in before:
            buffer.copy_(value)
        _set_random_state(self.device, state)
        self.convolutions = self.eager_convolutions
        terms = super().differentiate(loss, batch, share)  # raises errors of the loss itself
        self.compiled = loss
        self.log(f"compile: not used, the compiler failed ({failure})")
        return terms


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Recorder(Protocol):
    """Interface of an object that records a function of tensors that are updated in place."""

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function without recording it."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the function, without computing anything. Returns a replay, whose result the next replay of any
        recording may overwrite. Raises RuntimeError, after which `run` works, if the function cannot be recorded."""


class CudaGraphs:
    """Recorder of CUDA graphs on one device.

    Its graphs share a memory pool, so a smaller last batch needs no second set of activations. A replay may overwrite
    whatever another graph left in the pool. Nothing is left there: graphs run one after another on the same stream,
    gradients are freed within the step, optimizer state is older than the first recording, and results are copied
    before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """Run on the stream of the graphs, which autograd must have used before a recording."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: CUDA calls of other threads do not end the recording.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            # torch.cuda.graph (2.4 to 2.14, at least) leaves its stream current if the end of the recording raises.
            torch.cuda.set_stream(current)
            # The random generator still counts as recording, so dropout would raise an error. A copy of its state
            # does not count as recording.
            generator = torch.cuda.default_generators[self.stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise

        def replay() -> Tensor:
            graph.replay()
            return result
        return replay


class GraphedStep:
    """`Step` on one GPU, recorded as a CUDA graph and replayed. Its optimizers need `reads_rate_from_tensor`.

    At the batch sizes of these recipes, a GPU computes faster than Python can launch the hundreds of operations of a
    step; a graph launches them at once. For each batch size, the first steps run eagerly: they create the optimizer
    state, select algorithms and compile. The next step is recorded. A replay reads the draw and the learning rates from
    static tensors. Eager steps read the same tensors, so all steps of a run have the same rates, rounded to float32. A
    graph updates the tensors of the optimizer state that it was recorded with, so load a state before the first step.
    """

    WARM_UP = 3  # eager steps per batch size

    def __init__(self, step: Step, log: Callable[[str], None], recorder: Recorder | None = None) -> None:
        """recorder: default `CudaGraphs`."""
        self.step, self.log, self.recorder = step, log, recorder or CudaGraphs(step.device)
        self.seen: dict[int, int] = {}
        self.graphs: dict[int, tuple[Callable[[], Tensor], Draw]] = {}
        self.rates: list[float] = []  # learning rate of each parameter group
        self.static_rates = [torch.zeros((), device=step.device) for _ in self._groups()]  # the same, read by all steps
        self.recordable = True

    @property
    def names(self) -> list[str]:
        return self.step.names

    def __call__(self, draw: Draw, size: int) -> Tensor:
        self._update_rates()
        if self.recordable and size not in self.graphs and self.seen.get(size, 0) >= self.WARM_UP:
            self._record(draw, size)
        if size not in self.graphs:
            self.seen[size] = self.seen.get(size, 0) + 1
            return self.recorder.run(lambda: self._run(draw, size))
        replay, static = self.graphs[size]
        for name, values in draw.items():
            static[name].copy_(values)
        return replay().clone()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.step.optimizers for group in optimizer.param_groups]

    def _update_rates(self) -> None:
        """Copy changed learning rates to their tensors."""
        rates = [group["lr"] for group in self._groups()]
        if rates != self.rates:
            self.rates = rates
            for rate, static in zip(rates, self.static_rates, strict=True):
                static.fill_(rate)

    def _run(self, draw: Draw, size: int) -> Tensor:
        """Run the step with learning rates from tensors. Outside of it they are floats, as checkpoints hold them."""
        groups = self._groups()
        try:
            for group, static in zip(groups, self.static_rates, strict=True):
                group["lr"] = static
            return self.step(draw, size)
        finally:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate

    def _record(self, draw: Draw, size: int) -> None:
        static = {name: values.clone() for name, values in draw.items()}
        try:
            replay = self.recorder.record(lambda: self._run(static, size))
        except RuntimeError as error:  # nothing has run yet
            if interrupts.find_interrupt(error):  # an interrupt, not a failure of the recording
                raise
            self.step.zero_grad()  # gradients of the recording, not computed
            # All further steps run eagerly, those of recorded sizes too: earlier graphs read a state of the random
            # generator that is no longer used.
            self.recordable, self.graphs = False, {}
            reason = error.__context__ or error  # ending a failed recording raises too
            self.log(f"cuda_graph: not used, the step cannot be recorded ({first_line(reason)})")
            return
        self.graphs[size] = replay, static


def reads_rate_from_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads a learning rate that is a float32 tensor on the device there, as fused kernels do.
    Other optimizers wait for its value."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW)
