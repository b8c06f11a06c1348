"""Controls: attacks whose answers are replaced by answers that do not depend on the image.

The remaining gain of a student is label smoothing, not theft. Show an attack that uses labels, or the class of an
image, beside its controls.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.base import Attack, AttackParams, classes
from utils.data import Batch
from utils.params import describe_problem


class ControlParams(AttackParams):
    """Parameters of a control: the attack that it repeats, and the parameters of that attack."""

    keeps_top_class: ClassVar[bool] = True  # whether the replaced answers have a top class

    of: str = Field("kd", description="attack to run on the answers of the control; a control is refused")
    of_parameters: dict[str, Any] = Field(
        {}, description="parameters of the attack `of`; others have the attack's defaults for the data set")

    @model_validator(mode="before")
    @classmethod
    def _check_attack(cls, values: Any) -> Any:
        """Check the attack and its parameters, and add the published defaults for the run's data set."""
        fields = cls.model_fields
        name, given = (values.get(key, fields[key].default) if isinstance(values, dict) else None
                       for key in ("of", "of_parameters"))
        if not isinstance(name, str) or not isinstance(given, dict):
            return values  # pydantic reports the wrong type
        try:
            kind = REGISTRY.entry(name).value.Params
        except ValueError as error:
            raise ValueError(f'"of": {error}') from None
        if issubclass(kind, ControlParams):
            raise ValueError(f'"of" is "{name}", which is a control: choose an attack')
        dataset = values.get("dataset")
        given = {**(kind.published.get(dataset, {}) if isinstance(dataset, str) else {}), **given}
        try:
            attack = kind(**given)
        except ValidationError as error:
            problems = "; ".join(describe_problem(problem, kind) for problem in error.errors())
            raise ValueError(f'"of_parameters" of the attack "{name}": {problems}') from None
        if attack.reads_top_class and not cls.keeps_top_class:
            raise ValueError(f'the attack "{name}" picks the top class of an answer, and this control has none')
        return {**values, "of_parameters": given}

    @property
    def attack_params(self) -> AttackParams:
        """Parameters of the attack `of`."""
        return REGISTRY[self.of].Params(**self.of_parameters)

    @property
    def control_of(self) -> str:
        return self.of

    @property
    def settings_of(self) -> dict[str, Any]:
        return self.attack_params.model_dump()

    @property
    def reads_labels(self) -> bool:
        return self.reads_class or self.attack_params.reads_labels

    @property
    def needs_labels(self) -> str:
        why = self.attack_params.needs_labels
        return f'in "of_parameters", {why}' if why else ""

    @property
    def views(self) -> int:
        return self.attack_params.views


class Control(Attack):
    """An attack on replaced answers. The class of each image is its label or, for a thief without labels, the top class
    of its original answer; the attack gets the class as the label."""

    Params: ClassVar[type[AttackParams]] = ControlParams
    params: ControlParams

    def __init__(self, params: ControlParams, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.attack = REGISTRY[params.of](params.attack_params, num_classes)

    @abstractmethod
    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Replacements for the answers, (B, C), log-probabilities up to a constant per row.

        Args:
            answers: (B, C), the interface's answers.
            labels: int64 (B,), the classes of the images.
        """

    def learn_defense(self, defend: Callable[[Tensor], Tensor], answers: Tensor) -> str:
        return ""  # the attack does not get the defended answers

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        self.attack.seed = self.seed
        self.attack.prepare(network, images)

    def build_optimizer(self, learning_rate: float) -> torch.optim.Optimizer | None:
        return self.attack.build_optimizer(learning_rate)

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        labels = classes(batch, answers)
        terms: dict[str, Tensor] = self.attack(student, batch._replace(labels=labels), self.replace(answers, labels))
        return terms
