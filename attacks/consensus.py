"""Distillation on the images that the teacher classifies as labeled; the others are left out.

    loss = alpha * T^2 * mean KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * mean CE(student(x), y)

Both means are over the images of the batch with argmax answers = y; without such images the loss is 0. Ours; the
defaults are those of `kd`.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.kd import KD
from utils.data import Batch
from utils.losses import at_least_float32, kl_per_sample


@REGISTRY.register("consensus", display_name="Consensus", source="ours")
class Consensus(KD):
    """Leaves out images whose label is not the top class of the answer, and trains as `kd` on the others."""

    class Params(KD.Params):
        reads_class = True

        @property
        def reads_top_class(self) -> bool:
            return True

        @property
        def needs_labels(self) -> str:
            return "images whose labels the teacher does not predict are left out"

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        params, labels = self.params, batch.labels
        if labels is None:
            raise ValueError(f"no labels: {params.needs_labels}")
        logits = at_least_float32(student(batch.images))
        agreed = (answers.argmax(1) == labels).to(logits.dtype)  # not a boolean index, which synchronizes a GPU
        weights = agreed / agreed.sum().clamp(min=1)
        kl = params.temperature**2 * (weights * kl_per_sample(answers, logits, temperature=params.temperature)).sum()
        ce = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
        return {"loss": params.alpha * kl + (1 - params.alpha) * ce, "kl": kl, "cross_entropy": ce,
                "agreed": agreed.mean()}
