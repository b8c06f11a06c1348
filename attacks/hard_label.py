"""Label-only extraction, the top-1 attack of ModelGuard (Tang et al., USENIX Security 2024):

    loss = alpha * CE(student(x), argmax answers) + (1 - alpha) * CE(student(x), y)

In a tie, the top class is the one with the lowest index. A label-only interface returns just the top class, and
defenses that keep it do not affect this attack. With `alpha` 1, the default, the thief needs no labels; `alpha` 0.5 is
the hard distillation of Touvron et al. (ICML 2021, arXiv:2012.12877).
"""
from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, WeightedParams, weighted_terms
from utils.data import Batch
from utils.losses import cross_entropy


@REGISTRY.register("hard_label", display_name="Hard label",
                   source="top-1 attack of Tang et al. (ModelGuard), USENIX Security 2024")
class HardLabel(Attack):
    """Trains the student on the top class of each answer, and on the labels with weight 1 - `alpha`."""

    class Params(WeightedParams):
        alpha: float = Field(
            1.0, ge=0, le=1, description="weight of the cross-entropy with the teacher's top class; the cross-entropy "
                                         "with the labels has 1 - `alpha`")

        @property
        def reads_top_class(self) -> bool:
            return True

        @property
        def top_class_only(self) -> bool:
            return self.alpha == 1

    params: Params

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        logits = student(batch.images)
        hard_label = cross_entropy(logits, answers.argmax(1))
        return weighted_terms(logits, batch, alpha=self.params.alpha, hard_label=hard_label)
