"""Skeptical student (Kundu et al., "Analyzing the Confidentiality of Undistillable Teachers in Knowledge Distillation",
NeurIPS 2021).

    loss = CE(h0, y)                                                                 for epoch <= delay, from 0
    loss = CE(h0, y) + alpha * T^2 * KL(softmax(answers / T) || softmax(h2 / T)) + (1 - alpha) * CE(h2, y)
           + self_alpha * KL(softmax(h0 / T) || softmax(h1 / T)) + (1 - self_alpha) * CE(h1, y)    afterwards

h0 is the student's output. h1 and h2 are the outputs of auxiliary heads on the last but one and last but two stages.
The teacher affects the student only through h2, which limits the damage of a nasty teacher. The KL of h0 and h1 has no
factor T^2. The heads are not part of the student.

A head has the architecture of the published code (ksouvik52/Skeptical2021): a gate times the features, a separable
convolution for each remaining stage, which halves the size and doubles the channels up to 512, pooling and a linear
layer. Any student works: with two stages, both heads are on the first; without stages (a perceptron, a vision
transformer), linear heads are on the input of the classifier. Deviations from the published code:
- Stages are those of `model.features.stages`; the published MobileNetV2 has branches after its stages 2, 4 and 5.
- h0 is detached as the target of the inner KL; in the published code, the gradient pulls h0 towards h1.
- The third head of the published code, which is never trained, is left out.
- During the delay the gradients of the heads are zero, not None: weight decay and running statistics still change them.
- A thief without labels uses the top class of the answer as the label in all terms, including CE(h0).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, AttackParams, classes
from model.features import capture_inputs, capture_outputs, classifier, pooled, run_once, stages
from utils.data import Batch
from utils.errors import UserError
from utils.losses import cross_entropy, kl_divergence

MAX_CHANNELS = 512  # largest width of a head


@REGISTRY.register("skeptical", display_name="Skeptical", source="Kundu et al., NeurIPS 2021")
class Skeptical(Attack):
    """Trains an auxiliary head of the student on the answers, and the student's output on the labels or, for a thief
    without labels, on the top classes of the answers."""

    class Params(AttackParams):
        reads_class = True
        temperature: float = Field(20.0, gt=0, description="temperature T of the softened outputs in both KL terms")
        alpha: float = Field(
            0.9, ge=0, le=1, description="weight of KL(answers || h2), where h2 is the auxiliary head on the last "
                                         "stage but two; the cross-entropy of h2 has 1 - `alpha`")
        self_alpha: float = Field(
            0.3, ge=0, le=1, description="weight of KL(student's output || h1), where h1 is the auxiliary head on the "
                                         "last stage but one; the cross-entropy of h1 has 1 - `self_alpha`")
        delay: int = Field(
            20, ge=-1, description="last epoch, counted from 0, in which only the student's output is trained, on the "
                                   "labels; -1: none")

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.heads = nn.ModuleList()  # for h1 and h2
        self.places: tuple[str, ...] = ()  # modules of the student that feed the heads
        self.capture = capture_outputs

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        if len(self.heads):
            return
        size, count = images.shape[-1], self.num_classes
        names = list(stages(network, size))
        if names:
            self.places = names[-2], names[max(len(names) - 3, 0)]
        else:
            place = classifier(network, size)
            if place is None:
                raise UserError("the attack skeptical needs a student that halves height and width, or whose logits "
                                "come from a linear layer: choose another student")
            self.places, self.capture = (place, place), capture_inputs
        with self.capture(network, *self.places) as captured:
            run_once(network, size)
        for place in self.places:
            if names:
                head: nn.Module = Head(captured[place].shape[1], len(names) - 1 - names.index(place), count)
            else:
                head = nn.Sequential(Pooled(), nn.Linear(_pooled(captured[place]).shape[1], count))
            self.heads.append(head.to(images.device))

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        if not len(self.heads):
            with torch.random.fork_rng([]):
                torch.manual_seed(self.seed)
                self.prepare(student, batch.images)
        params, labels = self.params, classes(batch, answers)
        with self.capture(student, *self.places) as captured:
            logits = student(batch.images)
        inner, outer = (head(captured[place]) for head, place in zip(self.heads, self.places, strict=True))
        terms = {
            "cross_entropy": cross_entropy(logits, labels),
            "kl": params.temperature**2 * kl_divergence(answers, outer, temperature=params.temperature),
            "outer_cross_entropy": cross_entropy(outer, labels),
            "self_kl": kl_divergence(logits.detach(), inner, temperature=params.temperature),
            "inner_cross_entropy": cross_entropy(inner, labels)}
        of_heads = (params.alpha * terms["kl"] + (1 - params.alpha) * terms["outer_cross_entropy"]
                    + params.self_alpha * terms["self_kl"] + (1 - params.self_alpha) * terms["inner_cross_entropy"])
        return {"loss": terms["cross_entropy"] + (batch.epoch > params.delay).float() * of_heads, **terms}


class Head(nn.Module):
    """Classifier on features (B, C, H, W): gate, separable convolutions with stride 2, pooling, linear layer."""

    def __init__(self, channels: int, halvings: int, num_classes: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(*separable(channels, channels), nn.BatchNorm2d(channels), nn.ReLU())
        layers: list[nn.Module] = []
        for _ in range(halvings):
            wider = max(channels, min(2 * channels, MAX_CHANNELS))
            layers += separable(channels, wider)
            channels = wider
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        gate = F.interpolate(self.gate(features), size=features.shape[2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.body(features * gate.sigmoid())
        return logits


def separable(channels: int, wider: int) -> list[nn.Module]:
    """Two separable 3x3 convolutions, the first with stride 2, the second with `wider` output channels."""
    layers: list[nn.Module] = []
    for stride, made in ((2, channels), (1, wider)):
        layers += [nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
                   nn.Conv2d(channels, made, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    return layers


class Pooled(nn.Module):
    """Features, averaged over positions: (B, D)."""

    def forward(self, features: Tensor) -> Tensor:
        return _pooled(features)


def _pooled(features: Tensor) -> Tensor:
    """Mean over positions, (B, D), of feature maps (B, D, H, W) or tokens (B, N, D)."""
    return features.mean(1) if features.ndim == 3 else pooled(features)
