"""Base classes of methods that work in rounds: make images with the teacher, then train the student on them.

The student minimizes T^2 KL(teacher || student), mean over the batch, by SGD. The modules cmi, deepinversion and
generative define the images.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datafree.defense import BackdoorDefense, RetrospectionEpoch
from datafree.distiller import DataSpec, Distiller, LossMeter
from datafree.inversion import batch_norm_loss
from datafree.params import InversionParams, SynthesisParams
from datafree.pool import ImagePool
from model.features import Captured, batch_norms, capture_inputs
from utils import seeds
from utils.console import progress_bar
from utils.convolution import fast_convolutions
from utils.errors import UserError
from utils.losses import kl_divergence
from utils.results import Row
from utils.step import autocast
from utils.supervised import cosine, load_optimizer


class Synthesis(Distiller, ABC):
    """Distiller that works in rounds. An epoch has `epoch_steps` student steps, a round `student_steps` of them."""

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: SynthesisParams,
                 dtype: torch.dtype) -> None:
        """Arguments: see `Distiller`. Raises UserError for parameters that do not fit together or to the teacher."""
        self._student, self._teacher, self._spec, self._params, self._dtype = student, teacher, spec, params, dtype
        self._device = spec.mean.device
        self.defense = BackdoorDefense(teacher, params, temperature=params.temperature, image_size=spec.image_size)
        self._optimizer = self._build_optimizer(params.learning_rate)
        self._student_steps = params.student_steps or params.epoch_steps
        self._rounds, remainder = divmod(params.epoch_steps, self._student_steps)
        if remainder:
            raise UserError(f'"epoch_steps": {params.epoch_steps} must be a multiple of "student_steps", '
                            f"{self._student_steps}")
        self.num_images = self._rounds * self._student_steps * params.batch_size
        weights = {name: value for name, value in params if name.endswith("_weight") and name[:2] not in ("sv", "sr")}
        if not any(weights.values()):
            raise UserError(f"{', '.join(weights)} are 0: set at least one of them, or images have no loss")
        self._batch_norms = batch_norms(teacher)
        with torch.inference_mode(), capture_inputs(teacher, *self._batch_norms) as captured:  # some may never run
            teacher(torch.zeros(2, 3, spec.image_size, spec.image_size, device=self._device))
        self._num_features = sum(call.value.shape[1] for call in captured.calls)
        if not self._num_features and params.batch_norm_weight:
            raise UserError(f'"batch_norm_weight": {params.teacher_model} has no batch norms: set it to 0')

    @abstractmethod
    def synthesize(self, random: torch.Generator) -> dict[str, Tensor]:
        """Make images, with the student in eval mode. Return the mean of each loss over the synthesis steps."""

    @abstractmethod
    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        """Return `student_steps` batches (B, 3, H, W) of normalized images."""

    def training_images(self) -> Iterator[Tensor]:
        random = seeds.generator(self._params.seed, "synthesis", self._params.num_epochs)
        while True:
            yield from self.sample(random)

    def setup(self, log: Callable[[str], None]) -> None:
        self.defense.setup(log)

    def epoch(self, epoch: int, title: str) -> Row:
        params = self._params
        retrospection = self.defense.start_epoch(epoch)
        if retrospection and retrospection.is_first:
            self._optimizer = self._build_optimizer(params.sr_learning_rate)
        rate = cosine(params.learning_rate, epoch / params.num_epochs)
        if retrospection:
            rate = retrospection.learning_rate(epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        random = seeds.generator(params.seed, "synthesis", epoch)
        synthesis_meter, student_meter = LossMeter(), LossMeter()
        with progress_bar(self.num_images, title) as bar:
            for number in range(self._rounds):
                self._student.eval()
                synthesis_meter.add(self.synthesize(random))
                self._student.train()
                for images in self.sample(random):
                    student_meter.add(self._train_student(images, retrospection))
                    bar.update(len(images))
                if self._device.type == "cpu":  # elsewhere, a check would synchronize the device
                    synthesis_meter.check(epoch, number + 1)
                    student_meter.check(epoch, number * self._student_steps + 1)
        synthesis_meter.check(epoch)
        student_meter.check(epoch)
        return {"learning_rate": rate, **synthesis_meter.means(), **student_meter.means()}

    def _forward_teacher(self, images: Tensor) -> tuple[Tensor, Captured, dict[str, Tensor]]:
        """Return the teacher's logits (B, C) for synthetic images (B, 3, H, W), the inputs of its batch norms, and the
        weighted losses that all methods share, if enabled: `batch_norm` and `vaccine`."""
        with capture_inputs(self._teacher, *self._batch_norms) as captured:
            logits = self._teacher(images)
        losses = weighted_losses({"batch_norm": (self._params.batch_norm_weight, lambda: batch_norm_loss(captured))})
        if vaccine := self.defense.vaccine:
            vaccine.observe(logits, images)
            losses["vaccine"] = vaccine.penalty(logits, images)
        return logits, captured, losses

    def _train_student(self, images: Tensor, retrospection: RetrospectionEpoch | None) -> dict[str, Tensor]:
        """Train the student for one step, with self-retrospection if it is given. Return scalars to log."""
        temperature = self._params.temperature
        with autocast(self._device, self._dtype), fast_convolutions(self._device, self._dtype):
            with torch.no_grad():
                teacher_logits = self._teacher(images)
            loss = temperature**2 * kl_divergence(teacher_logits, self._student(images), temperature=temperature)
        self._optimizer.zero_grad()
        loss.backward()
        more = retrospection.accumulate(self._student, self._teacher, images) if retrospection else {}
        norm = nn.utils.clip_grad_norm_(self._student.parameters(), torch.inf)
        self._optimizer.step()
        return {"loss": loss, "gradient_norm": norm, **more}

    def _build_optimizer(self, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self._student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, fused=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optim_dict": self._optimizer.state_dict(), "defence": self.defense.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self._optimizer, state["optim_dict"])
        self.defense.load_state_dict(state["defence"])


class Inversion(Synthesis):
    """Synthesis that adds its images to a pool, from which the student learns. By default a round is an epoch."""

    _params: InversionParams

    def __init__(self, student: nn.Module, teacher: nn.Module, spec: DataSpec, params: InversionParams,
                 dtype: torch.dtype) -> None:
        super().__init__(student, teacher, spec, params, dtype)
        self._pool = ImagePool(spec)

    def _targets(self, count: int, random: torch.Generator) -> Tensor:
        """Draw the target classes of new images: int64 (count,), uniform, sorted."""
        return torch.randint(self._spec.num_classes, (count,), generator=random).sort().values.to(self._device)

    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        return self._pool.batches(self._student_steps, self._params.batch_size, random)

    def epoch_images(self) -> dict[str, Tensor]:
        """Newest images of the pool, (B, 3, H, W) in [0, 1], and the last perturbation of self-retrospection."""
        newest = self._pool.images[-64:].permute(0, 3, 1, 2) / 255
        return {**({"synthetic": newest} if len(newest) else {}), **self.defense.epoch_images()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pool": self._pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pool.load_state_dict(state["pool"])


def weighted_losses(losses: dict[str, tuple[float, Callable[[], Tensor]]]) -> dict[str, Tensor]:
    """Multiply losses by their weights. Losses with weight 0 are not computed, and left out."""
    return {name: weight * loss() for name, (weight, loss) in losses.items() if weight}


class Best:
    """Tensors of the step with the least loss, chosen on the device without synchronizing it."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.tensors: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def update(self, loss: Tensor, *tensors: Tensor) -> None:
        if self.loss is None:
            self.loss, self.tensors = loss.detach().clone(), tuple(tensor.detach().clone() for tensor in tensors)
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.tensors = tuple(torch.where(better, new, old) for new, old in zip(tensors, self.tensors, strict=True))

