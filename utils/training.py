"""The one training loop: epochs, steps, evaluation, learning rate, precision.

It knows a stage only as `loss(network, batch) -> {"loss": tensor, name: tensor, ...}`: every named tensor is averaged
over the epoch and logged, `loss` is minimised.
"""
from __future__ import annotations

import math
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import distributed, seeds
from utils.allocator import keep_freed_memory
from utils.data import Batch, Images, TrainBatches, in_order
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.params import Params
from utils.step import CompiledStep, GraphedStep, Loss, Step, autocast

Row = dict[str, float]

MAX_AHEAD = 32  # steps that wait for a GPU: enough to keep it busy, few enough for the bar and an interrupt


@dataclass
class Progress:
    """What a run has done so far. `history`: a row per epoch, reproducible; `timings`: the same of the clock."""

    history: list[Row] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> Row:
        """The row of the epoch with the highest accuracy on the held-out images, or, without any, on the test
        images; the later one on a tie."""
        key = "validation_accuracy" if "validation_accuracy" in self.history[-1] else "test_accuracy"
        return max(self.history, key=lambda row: (row[key], row["epoch"]))

    @property
    def images_per_second(self) -> float:
        """Training speed: the median epoch's."""
        return statistics.median(row["images_per_second"] for row in self.timings)


def learning_rate(params: Params, epoch: int) -> float:
    """The learning rate of an epoch (counted from 0): times `gamma` at each epoch of the schedule up to it."""
    return params.learning_rate * params.gamma ** sum(epoch >= milestone for milestone in params.schedule)


def build_optimizer(params: Params, network: nn.Module) -> torch.optim.Optimizer:
    """Adam without weight decay for the plain networks, SGD with momentum 0.9 and weight decay 5e-4 for all others."""
    if params.model_name in ("net", "mlp"):
        on_gpu = next(network.parameters()).is_cuda  # where a step may be recorded as a graph
        return torch.optim.Adam(network.parameters(), lr=params.learning_rate, fused=True, capturable=on_gpu)
    return torch.optim.SGD(network.parameters(), lr=params.learning_rate, momentum=0.9, weight_decay=5e-4, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser the state of another, which may have run on another device."""
    own = [group.get("capturable") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, capturable in zip(optimizer.param_groups, own, strict=True):
        if capturable is not None:
            group["capturable"] = capturable  # of this device


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


class Frozen:
    """A network that only answers: eval mode, no gradients, logits (B, C) of a batch that a loss may use."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.remembered: Tensor | None = None  # (N, C), of this epoch's view of each training image

    def __call__(self, batch: Batch) -> Tensor:
        if self.remembered is not None:
            return self.remembered[batch.index]
        return self.answer(batch.images)

    def answer(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        with torch.inference_mode():
            logits = self.network(images)
        return logits.clone()  # outside inference mode: a tensor that autograd may save


def evaluate(network: nn.Module, part: Images, dtype: torch.dtype) -> Row:
    """Accuracy in percent (correct of all, exact) and mean cross-entropy in nats over a part of the data."""
    device = part.labels.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = network.training
    network.eval()
    with torch.inference_mode(), autocast(device, dtype):
        for images, labels in in_order(part):
            logits = network(images)
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] += cross_entropy(logits, labels).double() * len(labels)
    network.train(was_training)
    correct, loss = distributed.sum_over_ranks(sums).tolist()
    return {"accuracy": 100 * correct / len(part), "loss": loss / len(part)}


def progress_bar(images: int, title: str) -> tqdm:
    """A bar that counts images, of the first process, and quiet where stderr is not a terminal."""
    quiet = True if distributed.rank() else None
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=quiet)


def build_step(network: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, batches: TrainBatches,
               params: Params, dtype: torch.dtype, say: Callable[[str], None]) -> Step | GraphedStep:
    """The training step in the fastest form that parameters and device allow; `say` logs what they do not."""
    device = batches.part.labels.device
    what = distributed.parallel(network, device), loss, optimizer, batches, dtype
    step = CompiledStep(*what, say=say) if params.compile is True else Step(*what)
    if params.cuda_graph and device.type == "cuda" and not distributed.launched():
        say("cuda_graph: steps are recorded and replayed")
        return GraphedStep(step, say)
    if params.cuda_graph is True:
        say("cuda_graph: steps run as written, recording takes a single GPU")
    return step


def train(network: nn.Module, step: Step | GraphedStep, optimizer: torch.optim.Optimizer, batches: TrainBatches,
          evaluated: dict[str, Images], params: Params, dtype: torch.dtype, progress: Progress,
          start_of_epoch: Callable[[int], None], end_of_epoch: Callable[[], None]) -> None:
    """Run the epochs that `progress` lacks and evaluate after each.

    `start_of_epoch` gets the number of the epoch, counted from 0; `end_of_epoch` saves and logs. Raises UserError when
    a loss or gradient is not finite, before `end_of_epoch`: what was saved stays good.
    """
    for epoch in range(progress.epoch, params.num_epochs):
        start = time.perf_counter()
        torch.manual_seed(seeds.derive_seed(params.seed, "dropout", epoch, distributed.rank()))
        rate = learning_rate(params, epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        start_of_epoch(epoch)
        network.train()
        terms = _train_epoch(step, batches, epoch, params.num_epochs)
        trained = time.perf_counter()
        row = {"epoch": epoch + 1, "learning_rate": rate, **terms}
        for name, part in evaluated.items():
            row |= {f"{name}_{key}": value for key, value in evaluate(network, part, dtype).items()}
            if not math.isfinite(row[f"{name}_loss"]):
                raise UserError(f"epoch {epoch + 1}: the network's outputs on the {name} images are not finite")
        progress.history.append(row)
        progress.timings.append({"images_per_second": batches.usable / (trained - start),
                                 "seconds": time.perf_counter() - start})
        end_of_epoch()


def _train_epoch(step: Step | GraphedStep, batches: TrainBatches, epoch: int, num_epochs: int) -> Row:
    """One pass over the training images. The mean of every named tensor of the loss, and of the gradient's norm."""
    device = batches.part.labels.device
    sizes, records, ahead = batches.batch_sizes(), [], deque()
    with progress_bar(sum(sizes), f"epoch {epoch + 1}/{num_epochs}") as bar:
        for size, draw in zip(sizes, batches.draws(epoch, device), strict=True):
            records.append(step(draw, size))
            if device.type == "cpu":  # elsewhere a look at every step would make the device wait
                _check_finite(records[-1:], step.names, epoch, len(records))
            else:
                ahead.append(torch.cuda.current_stream(device).record_event())
                if len(ahead) > MAX_AHEAD:
                    ahead.popleft().synchronize()
            bar.update(size)
    _check_finite(records, step.names, epoch, 1)
    weights = torch.tensor(sizes, dtype=torch.float64, device=device).unsqueeze(1)
    sums = distributed.sum_over_ranks((torch.stack(records).double() * weights).sum(0))
    return dict(zip(step.names, (sums / sum(sizes) / distributed.world_size()).tolist(), strict=True))


def _check_finite(records: list[Tensor], names: list[str], epoch: int, first_step: int) -> None:
    table = torch.stack(records)
    bad = ~table.isfinite().all(dim=1)
    if bad.any():
        step = int(bad.nonzero()[0])
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, table[step].tolist(), strict=True))
        raise UserError(f"epoch {epoch + 1}, step {first_step + step}: not finite: {values}; what was saved after an "
                        "earlier epoch is kept")
