"""Supervised training: optimizer steps over all training images in each epoch.

The stage provides the loss, `loss(network, batch) -> {"loss": tensor, name: tensor, ...}`: `loss` is minimized, and all
named tensors are averaged over the epoch and logged.
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed, launcher
from utils.augment import denormalize, normalize
from utils.console import progress_bar
from utils.data import TrainBatches
from utils.errors import UserError
from utils.memory import Phase
from utils.method import Method
from utils.params import DataParams, RecipeParams
from utils.results import Row
from utils.step import CompiledStep, GraphedStep, Loss, Step, reads_rate_from_tensor
from utils.training import Learner

MAX_AHEAD = 32  # queued GPU steps: enough to keep the GPU busy, few enough for progress bar and interrupts


def learning_rate(params: RecipeParams, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0: multiplied by `gamma` at each epoch of `schedule`, or half a cosine
    from `learning_rate` to 0 at the end of the run."""
    if params.annealing == "cosine":
        return cosine(params.learning_rate, epoch / params.num_epochs)
    return params.learning_rate * params.gamma ** sum(epoch >= milestone for milestone in params.schedule)


def cosine(rate: float, done: float) -> float:
    """Cosine learning rate after a fraction `done` of the training (Loshchilov & Hutter, 2017, without restarts)."""
    return rate * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(params: RecipeParams, network: nn.Module) -> torch.optim.Optimizer:
    """Optimizer of a network: SGD (momentum 0.9, weight decay 5e-4) or Adam (no weight decay); `auto`: the recipe of
    the network."""
    recipe = getattr(network, "default_optimizer", "sgd")
    if (params.optimizer if params.optimizer != "auto" else recipe) == "adam":
        return build_adam(network, params.learning_rate)
    return torch.optim.SGD(network.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=5e-4, fused=True)


def build_adam(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam with the default betas and no weight decay."""
    on_gpu = next(network.parameters()).is_cuda  # a step may be recorded as a CUDA graph
    return torch.optim.Adam(network.parameters(), lr=rate, fused=True, capturable=on_gpu)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, which may have run on another device."""
    own = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, capturable in zip(optimizer.param_groups, own, strict=True):
        if capturable is not None:
            group["capturable"] = capturable  # as needed on this device


class Supervised(Learner):
    """Learner that minimizes a loss on batches of the training images, all images in each epoch."""

    def __init__(self, network: nn.Module, loss: Loss, batches: TrainBatches, params: DataParams, dtype: torch.dtype,
                 method: Method | None = None, start_of_epoch: Callable[[int], None] = lambda _: None) -> None:
        """method: module whose own parameters are trained with the network. start_of_epoch: called with the epoch,
        counted from 0, before its steps. Raises UserError if the method cannot be trained."""
        self.network, self._loss, self.batches, self._params, self._dtype = network, loss, batches, params, dtype
        self.method = method or nn.Module()
        self._start_of_epoch = start_of_epoch
        self.optimizer = build_optimizer(params, network)
        self._method_optimizer = self._add_method(method) if method else None
        self.num_images = batches.usable

    def _add_method(self, method: Method) -> torch.optim.Optimizer | None:
        """Prepare the method. Its parameters join the network's optimizer unless it returns an optimizer of its own."""
        part = self.batches.part
        method.to(part.labels.device)
        method.normalization = part.mean, part.std
        with torch.random.fork_rng([]):
            torch.manual_seed(method.seed)
            method.prepare(self.network, normalize(part.images[:2], part.mean, part.std))
        parameters: list[Tensor] = list(method.parameters())
        if (parameters or list(method.buffers())) and distributed.world_size() > 1:
            raise UserError("a method with its own parameters or running averages runs on a single device: use one GPU")
        own = method.build_optimizer(self._params.learning_rate) if parameters else None
        for group in own.param_groups if own else ():
            if "capturable" in group:
                group["capturable"] = parameters[0].is_cuda  # a step may be recorded as a CUDA graph
        if parameters and own is None:
            self.optimizer.add_param_group({"params": parameters})
        return own

    def setup(self, log: Callable[[str], None]) -> None:
        self.method.train()
        optimizers = [self.optimizer, *([self._method_optimizer] if self._method_optimizer else [])]
        self.step = build_step(self.network, self._loss, optimizers, self.batches, self._params, self._dtype, log,
                               self.method)

    def epoch(self, epoch: int, title: str) -> Row:
        rate = learning_rate(self._params, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._start_of_epoch(epoch)
        self.network.train()
        return {"learning_rate": rate, **train_epoch(self.step, self.batches, epoch, title)}

    def first_images(self) -> dict[str, Tensor]:
        """First augmented images."""
        part = self.batches.part
        return {"augmented": denormalize(next(self.batches.epoch(0)).images[:64], part.mean, part.std)}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"optim_dict": self.optimizer.state_dict()}
        if own := self.method.state_dict():
            state["method"] = own
        if self._method_optimizer:
            state["method_optim_dict"] = self._method_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optim_dict"])
        if self.method.state_dict():
            self.method.load_state_dict(state["method"])
        if self._method_optimizer:
            load_optimizer(self._method_optimizer, state["method_optim_dict"])


def build_step(network: nn.Module, loss: Loss, optimizers: Sequence[torch.optim.Optimizer], batches: TrainBatches,
               params: DataParams, dtype: torch.dtype, log: Callable[[str], None],
               method: nn.Module | None = None) -> Step | GraphedStep:
    """Build the training step that the parameters ask for, and log what is not available. method: module with the
    loss's own parameters."""
    device = batches.part.labels.device
    what = distributed.parallel(network, device), loss, optimizers, batches, dtype, method
    step = Step(*what)
    if params.compile is True:
        log("compile: the first steps compile, which takes up to a minute")
        step = CompiledStep(*what, log=log)
    if params.cuda_graph is not True:  # auto: off
        return step
    if device.type != "cuda" or launcher.launched():
        log("cuda_graph: not used, it needs a single GPU")
        return step
    if not all(map(reads_rate_from_tensor, optimizers)):
        log("cuda_graph: not used, an optimizer is not a fused SGD or Adam")
        return step
    log("cuda_graph: steps are recorded and replayed")
    return GraphedStep(step, log)


def train_epoch(step: Step | GraphedStep, batches: TrainBatches, epoch: int, title: str) -> Row:
    """Train for one epoch. Returns the means of all named tensors of the loss and of the gradient norm."""
    device = batches.part.labels.device
    sizes, records = batches.batch_sizes(), list[Tensor]()
    ahead: deque[torch.cuda.Event] = deque()
    with progress_bar(sum(sizes), title) as bar, Phase(lambda: f"step {len(records) + 1}"):
        for size, draw in zip(sizes, batches.draws(epoch, device), strict=True):
            records.append(step(draw, size))
            if device.type == "cpu":  # a check of every step would make a GPU wait
                check_finite(records[-1:], step.names, epoch, len(records))
            else:
                ahead.append(torch.cuda.current_stream(device).record_event())
                if len(ahead) > MAX_AHEAD:
                    ahead.popleft().synchronize()
            bar.update(size)
    check_finite(records, step.names, epoch, 1)
    weights = torch.tensor(sizes, dtype=torch.float64, device=device).unsqueeze(1)
    sums = distributed.sum_over_ranks((torch.stack(records).double() * weights).sum(0))
    return dict(zip(step.names, (sums / sum(sizes) / distributed.world_size()).tolist(), strict=True))


def check_finite(records: list[Tensor], names: list[str], epoch: int, first_step: int) -> None:
    """Raise UserError with epoch, step and values if a value is not finite.

    records: float (K,) for each step from `first_step` (counted from 1) on. names: names of the K values.
    """
    table = torch.stack(records)
    bad = ~table.isfinite().all(dim=1)
    if bad.any():
        step = int(bad.nonzero()[0])
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, table[step].tolist(), strict=True))
        raise UserError(f"epoch {epoch + 1}, step {first_step + step}: not finite: {values}; saved "
                        "checkpoints are kept")
