"""Nasty teacher with a moving adversary: the idea of MISLEADER (2025, github.com/LabRAI/misleader) in one loop.

    network: loss = CE(network(x), y) - weight * T^2 * KL(softmax(network(x) / T) || softmax(student(x) / T))
    student: loss = T^2 * KL(softmax(network(v) / T) || softmax(student(v) / T))

The adversary of a nasty teacher is fixed, so the nasty teacher is not trained against other students. Here, the
adversary is a student that learns from the network during training. The student sees views v of the batch, flipped and
shifted at random, and the network's outputs for them in eval mode, as from an interface. The network minimizes its loss
with the student fixed and in eval mode; the student minimizes its loss with the network fixed. The returned loss is the
sum of both; their gradients do not mix.

Defaults are those of the published run: weight 0.001, SGD with learning rate 0.01 for the student. The authors give no
temperature for these terms, so T is 1. Differences from MISLEADER: one step of each network per batch instead of
alternating phases, one network instead of an ensemble of three, no distillation from a normal teacher (start from one
with `init_from`), and weaker augmentation of the student's images.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from defenses import REGISTRY
from defenses.base import Defense
from model import MODEL_NAMES, build_model
from utils.data import Batch
from utils.errors import UserError
from utils.losses import cross_entropy, kl_divergence
from utils.networks import check_image_size
from utils.params import MethodParams
from utils.step import eval_mode


@REGISTRY.register("moving", display_name="moving adversary",
                   source="after MISLEADER (LabRAI, 2025, github.com/LabRAI/misleader), in one loop")
class Moving(Defense):
    """Trains the network on the labels, and away from the outputs of a student that learns from it at the same time."""

    class Params(MethodParams):
        strength: ClassVar[str] = "weight"
        temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs in both KL terms")
        weight: float = Field(
            0.001, ge=0, description="weight of the KL term that moves the network away from the student")
        student_model: str | None = Field(
            None, description="architecture of the moving student, a network of the zoo with random initial weights; "
                              "null: that of the protected network")
        student_num_channels: int = Field(
            32, ge=1, description="width of the first layer if `student_model` is `net`")
        student_learning_rate: float = Field(
            0.01, gt=0,
            description="constant learning rate of the moving student (SGD, momentum 0.9, weight decay 5e-4)")

        @field_validator("student_model")
        @classmethod
        def _refuse_unknown_networks(cls, name: str | None) -> str | None:
            if name is not None and name not in MODEL_NAMES:
                raise ValueError(f"there is no network {name!r} in the zoo: choose from {', '.join(MODEL_NAMES)}")
            return name

        def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
            yield from super().ineffective_parameters()
            if self.student_model != "net":
                yield "student_num_channels", '"student_model" is not "net"'

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.student: nn.Module | None = None

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        if self.student is None:
            self.student = self._build_student(network, images).train()

    def _build_student(self, network: nn.Module, images: Tensor) -> nn.Module:
        if self.params.student_model is None:
            student = copy.deepcopy(network).requires_grad_(True)
            student.zero_grad()
            reinitialize(student)
            return student
        try:
            student = build_model(self.params.student_model, self.num_classes,
                                  num_channels=self.params.student_num_channels)
            check_image_size(student, images.shape[-1])
        except ValueError as error:
            raise UserError(f'"student_model": {error}') from None
        return student.to(images.device).to(memory_format=torch.channels_last)

    def build_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.params.student_learning_rate, momentum=0.9,
                               weight_decay=5e-4, fused=True)

    def forward(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self.student is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(self.seed)
                self.prepare(network, batch.images)
        assert self.student is not None
        temperature, views = self.params.temperature, random_views(batch.images)
        # The passes with gradients come first: autocast caches the weights that it casts, without gradients if the
        # first pass has none.
        logits, learned = network(batch.images), self.student(views)
        with torch.no_grad(), eval_mode(network) as answering, eval_mode(self.student) as adversary:
            answers, adversarial = answering(views), adversary(batch.images)
        terms = {
            "cross_entropy": cross_entropy(logits, batch.labels),
            "kl": temperature**2 * kl_divergence(logits, adversarial, temperature=temperature),
            "student_kl": temperature**2 * kl_divergence(answers, learned, temperature=temperature)}
        return {"loss": terms["cross_entropy"] - self.params.weight * terms["kl"] + terms["student_kl"], **terms}


def reinitialize(network: nn.Module) -> None:
    """Draw new initial weights, in place, by the `reset_parameters` of each module; all layers of torch have it.

    Parameters of other modules, such as position embeddings: vectors stay, the others are drawn from a truncated normal
    distribution with standard deviation 0.02.
    """
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)


def random_views(images: Tensor) -> Tensor:
    """Flip each image (B, 3, H, W) horizontally with probability 1/2 and shift it by up to 1/8 of its size in each
    direction, repeating its borders. Random numbers come from torch's generator on the images' device; channels last.
    """
    count, _, height, width = images.shape
    device = images.device

    def shifted(size: int) -> Tensor:
        shift = torch.randint(-(size // 8), size // 8 + 1, (count, 1), device=device)
        return (torch.arange(size, device=device) + shift).clamp(0, size - 1)

    rows, columns = shifted(height), shifted(width)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, width - 1 - columns, columns)
    each = torch.arange(count, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
