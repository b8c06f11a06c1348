"""Methods in rounds: make images that show what the teacher knows, then teach the student with images made so far.

    student   minimise T^2 KL(teacher || student), mean over the batch, by SGD

What is made and how is the method's: see cmi, deepinversion and generative.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from datafree.distiller import Defence, Facts, Terms
from datafree.features import Inside, batch_norm_loss, inside
from datafree.pool import ImagePool
from datafree.vaccine import generator_penalty
from utils import seeds
from utils.convolution import fast_convolutions
from utils.errors import UserError
from utils.logger import progress_bar
from utils.losses import kl_divergence
from utils.params import SynthesisParams
from utils.step import autocast
from utils.supervised import cosine, load_optimizer
from utils.training import Row


class Synthesis(ABC):
    """A `Learner` of the student. An epoch is `epoch_steps` steps of the student, `student_steps` of them a round."""

    def __init__(self, student: nn.Module, teacher: nn.Module, facts: Facts, params: SynthesisParams,
                 dtype: torch.dtype) -> None:
        """teacher: frozen. dtype: of the arithmetic of the networks."""
        self.student, self.teacher, self.facts, self.params, self.dtype = student, teacher, facts, params, dtype
        self.device = facts.mean.device
        self.defence = Defence(teacher, params, facts)
        self.optimizer = self._optimizer(params.learning_rate)
        self.student_steps = params.student_steps or params.epoch_steps
        self.rounds, rest = divmod(params.epoch_steps, self.student_steps)
        if rest:
            raise UserError(f'"epoch_steps": {params.epoch_steps} is no multiple of "student_steps", '
                            f"{self.student_steps}")
        self.images = self.rounds * self.student_steps * params.batch_size
        weights = {name: value for name, value in params if name.endswith("_weight") and name[:2] not in ("sv", "sr")}
        if not any(weights.values()):
            raise UserError(f"{', '.join(weights)} are 0: nothing is left to make images by")
        with torch.inference_mode(), inside(teacher) as seen:  # what there is to look at in this teacher
            teacher(torch.zeros(2, 3, facts.image_size, facts.image_size, device=self.device))
        self.num_features = sum(values.shape[1] for _, values in seen.batch_norms)
        self.has_classifier = seen.penultimate is not None
        if not self.num_features and params.batch_norm_weight:
            raise UserError(f'"batch_norm_weight": {params.teacher_model} has no batch norms; 0 does without')

    @abstractmethod
    def synthesise(self, random: torch.Generator) -> dict[str, Tensor]:
        """Make images, the student in evaluation mode. The mean of each loss over the steps that it took."""

    @abstractmethod
    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        """`student_steps` batches (B, 3, H, W) of images as the networks see them."""

    def begin(self, say: Callable[[str], None]) -> None:
        self.defence.begin(say)

    def epoch(self, epoch: int, title: str) -> Row:
        params, defence = self.params, self.defence
        retrospects = defence.retrospects(epoch)
        if defence.begins_retrospection(epoch):
            self.optimizer = self._optimizer(params.sr_learning_rate)
        rate = defence.rate(epoch) if retrospects else cosine(params.learning_rate, epoch / params.num_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        random, sr_random = seeds.generator(params.seed, "synthesis", epoch), defence.random(epoch)
        made, taught = Terms(), Terms()
        with progress_bar(self.images, title) as bar:
            for number in range(self.rounds):
                self.student.eval()
                made.add(self.synthesise(random))
                self.student.train()
                for images in self.sample(random):
                    taught.add(self._teach(images, sr_random if retrospects else None))
                    bar.update(len(images))
                if self.device.type == "cpu":  # elsewhere a look at every round would make the device wait
                    made.check(epoch, number + 1)
                    taught.check(epoch, number * self.student_steps + 1)
        made.check(epoch)
        taught.check(epoch)
        return {"learning_rate": rate, **made.means(), **taught.means()}

    def look(self, images: Tensor) -> tuple[Tensor, Inside, dict[str, Tensor]]:
        """What the teacher says of images (B, 3, H, W) that are being made, logits (B, C), what it computed inside, and
        the losses of every method that are on: `batch_norm` and `vaccine`, times their weights."""
        with inside(self.teacher) as seen:
            logits = self.teacher(images)
        self.defence.observe(logits, images)
        losses = weigh({"batch_norm": (self.params.batch_norm_weight, lambda: batch_norm_loss(seen))})
        if self.defence.shuffled:
            losses["vaccine"] = logits.new_zeros(())
        if coefficient := self.defence.coefficient:
            losses["vaccine"] = generator_penalty(logits, self.defence.shuffled(images), coefficient=coefficient)
        return logits, seen, losses

    def _teach(self, images: Tensor, sr_random: torch.Generator | None) -> dict[str, Tensor]:
        """A step of the student."""
        temperature = self.params.temperature
        with autocast(self.device, self.dtype), fast_convolutions(self.device, self.dtype):
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            loss = temperature**2 * kl_divergence(teacher_logits, self.student(images), temperature=temperature)
        self.optimizer.zero_grad()
        loss.backward()
        more = {}
        if sr_random is not None:
            more = self.defence.retrospect(self.student, self.teacher, images, sr_random)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), torch.inf)
        self.optimizer.step()
        return {"loss": loss, "gradient_norm": norm, **more}

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, fused=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optim_dict": self.optimizer.state_dict(), "defence": self.defence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optim_dict"])
        self.defence.load_state_dict(state["defence"])


class Inversion(Synthesis):
    """Synthesis that keeps what it makes in a pool, from which the student learns: a round is an epoch, as a rule."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pool = ImagePool(self.facts)

    def targets(self, count: int, random: torch.Generator) -> Tensor:
        """The classes that new images are made for: int64 (count,), uniform and sorted."""
        return torch.randint(self.facts.num_classes, (count,), generator=random).sort().values.to(self.device)

    def sample(self, random: torch.Generator) -> Iterable[Tensor]:
        return self.pool.batches(self.student_steps, self.params.batch_size, random)

    def pictures(self) -> dict[str, Tensor]:
        """The newest images of the pool, (B, 3, H, W) in [0, 1], and the perturbation."""
        newest = self.pool.images[-64:].permute(0, 3, 1, 2) / 255
        return {**({"synthetic": newest} if len(newest) else {}), **self.defence.pictures()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pool.load_state_dict(state["pool"])


def weigh(losses: dict[str, tuple[float, Callable[[], Tensor]]]) -> dict[str, Tensor]:
    """Weights times losses; one whose weight is 0 is not computed."""
    return {name: weight * loss() for name, (weight, loss) in losses.items() if weight}


class Best:
    """Tensors of the step with the least loss, chosen without a look at the values, which would make a GPU wait."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.tensors: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        if self.loss is None:
            self.loss, self.tensors = loss.detach().clone(), tuple(tensor.detach().clone() for tensor in tensors)
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.tensors = tuple(torch.where(better, new, old) for new, old in zip(tensors, self.tensors, strict=True))

