"""Averager student (Keser & Toreyin, ICLR 2023 Tiny Papers, "Averager Student").

    loss = alpha * T^2 * KL(softmax(mean_y / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)
    mean_y = mean over images of class y of the log-probabilities of their answers

Averaging nearly removes the false peaks that a nasty teacher gives to single images. Deviations from the published
code (rkevser/AveragerStudent):
- The mean is an exponential moving average over the run, with decay 0.99 per batch that contains the class. The
  published mean is over the batch (`"class_mean": "batch"`), which has one or two images of each class of CIFAR-100.
- The published code multiplies by alpha twice, so the teacher's term has the weight alpha^2; here the weight is alpha.
- Exact zeros in the answers count as probability 1e-6.
"""
from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, classes, weighted_terms
from utils.data import Batch
from utils.losses import finite_log_probabilities, kl_divergence
from utils.means import DECAY, ClassMeans


@REGISTRY.register("averager", display_name="Averager", source="Keser & Toreyin, ICLR 2023 Tiny Papers")
class Averager(Attack):
    """Trains the student on the mean answer of each class, and on the labels with weight 1 - `alpha`. The class is the
    label or, for a thief without labels, the top class of the answer."""

    class Params(WeightedParams):
        reads_class = True
        temperature: float = Field(20.0, gt=0, description="temperature T of the softened outputs in the KL term")
        class_mean: Literal["ema", "batch"] = Field(
            "ema", description="averaging of the answers by class. `ema`: exponential moving average over all batches; "
                               "`batch`: mean over the batch, as published")

    params: Params

    def __init__(self, params: Params, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.means = ClassMeans(num_classes, DECAY if params.class_mean == "ema" else 0.0)

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits, temperature = student(batch.images), self.params.temperature
        means = self.means(finite_log_probabilities(answers), classes(batch, answers))
        kl = temperature**2 * kl_divergence(means, logits, temperature=temperature)
        return weighted_terms(logits, batch, alpha=self.params.alpha, kl=kl)
