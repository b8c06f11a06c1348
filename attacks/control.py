"""Controls: an attack whose answers are replaced by others that no longer tell one image from another.

What a student still gains is label smoothing, not theft: an attack that reads labels, or the class of an image, is to
be shown beside its controls.
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
    """Which attack a control repeats with other answers, and the parameters of that attack."""

    keeps_top_class: ClassVar[bool] = True  # whether the replaced answers have the top class of their class

    of: str = Field("kd", description="attack that gets the replaced answers; not a control")
    of_parameters: dict[str, Any] = Field(
        {}, description="parameters of the attack `of`; others have the attack's defaults for the data set")

    @model_validator(mode="before")
    @classmethod
    def _check_attack(cls, values: Any) -> Any:
        """Check the attack and its parameters, and fill in those that are published for the run's data set."""
        fields = cls.model_fields
        name, given = (values.get(key, fields[key].default) if isinstance(values, dict) else None
                       for key in ("of", "of_parameters"))
        if not isinstance(name, str) or not isinstance(given, dict):
            return values  # the types of the fields refuse it
        try:
            kind = REGISTRY.entry(name).value.Params
        except ValueError as error:
            raise ValueError(f'"of": {error}') from None
        if issubclass(kind, ControlParams):
            raise ValueError(f'"of" is "{name}", which is a control itself: choose an attack')
        dataset = values.get("dataset")
        given = {**(kind.published.get(dataset, {}) if isinstance(dataset, str) else {}), **given}
        try:
            attack = kind(**given)
        except ValidationError as error:
            problems = "; ".join(describe_problem(problem, kind) for problem in error.errors())
            raise ValueError(f'"of_parameters" of the attack "{name}": {problems}') from None
        if attack.reads_top_class and not cls.keeps_top_class:
            raise ValueError(f'the attack "{name}" picks the top class of an answer, of which this control has none')
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
    """An attack with other answers. The class of each image is the label or, for a thief without labels, the top class
    of its answer, found before the answer is replaced; the attack gets it as the label."""

    Params: ClassVar[type[AttackParams]] = ControlParams
    params: ControlParams

    def __init__(self, params: ControlParams, num_classes: int) -> None:
        super().__init__(params, num_classes)
        self.attack = REGISTRY[params.of](params.attack_params, num_classes)

    @abstractmethod
    def replace(self, answers: Tensor, labels: Tensor) -> Tensor:
        """The answers that the attack gets, log-probabilities up to a constant per row, for answers (B, C) of images
        of classes `labels` (B,)."""

    def learn_defense(self, defend: Callable[[Tensor], Tensor], answers: Tensor) -> str:
        return ""  # it would be undone for answers that the attack does not get

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        self.attack.seed = self.seed
        self.attack.prepare(network, images)

    def build_optimizer(self, learning_rate: float) -> torch.optim.Optimizer | None:
        return self.attack.build_optimizer(learning_rate)

    def forward(self, student: nn.Module, batch: Batch, answers: Tensor) -> dict[str, Tensor]:
        labels = classes(batch, answers)
        terms: dict[str, Tensor] = self.attack(student, batch._replace(labels=labels), self.replace(answers, labels))
        return terms
