"""The stages: parameters common to all runs of a script, and the methods to choose from.

Importing this module imports no method and no torch; the methods of a stage are imported on first use.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

import attacks
import datafree
import defenses
from attacks.params import AttackParams
from backdoor.params import BackdoorParams
from datafree.params import DataFreeParams
from runs.audits import AuditParams
from utils.errors import UserError
from utils.params import (
    DataParams,
    Description,
    MethodParams,
    ModelOptions,
    Params,
    QueryParams,
    Stage,
    Switch,
    TeacherParams,
    name_answers,
)

__all__ = ["AUDIT", "DATAFREE", "KD", "NASTY", "POISONED", "SCRATCH", "STAGES", "answer_defense_name",
           "display_name", "recorded_params", "stage_of", "stage_of_script"]


class CacheParams(MethodParams):
    teacher_cache: Switch = Field(
        False, description="cache the frozen network's logits in `data/cache`, one entry per augmented view, for this "
                           "run and later ones")


class KDParams(AttackParams, BackdoorParams, QueryParams, TeacherParams, CacheParams, DataParams):
    """train_kd.py: a student of a frozen teacher."""

    script = "train_kd.py"
    attack: str = Field("kd", description="attack that trains the student on the teacher's answers")

    @model_validator(mode="after")
    def _refuse_what_does_not_fit(self) -> Self:
        if not self.labeled and self.needs_labels:
            raise ValueError(f'the thief has no labels, which the attack "{self.attack}" needs: {self.needs_labels}')
        if not self.labeled and self.validation_fraction:
            raise ValueError('the thief has no labels: there is no "validation_fraction" whose accuracy it knows')
        if self.needs_all_answers and self.queries != "once":
            raise ValueError(f'the attack "{self.attack}" studies all answers before the first epoch: set "queries" to '
                             '"once"')
        if self.views > 1 and self.augmentation is False:
            raise ValueError(f'the attack averages {self.views} augmented views, but "augmentation" is 0')
        return self

    @property
    def description(self) -> Description:
        own = {key: getattr(self, key) for key in type(self).model_fields if key not in KDParams.model_fields}
        return Description("student", method=self.control_of or self.attack,
                           plain=self.attack == KDParams.model_fields["attack"].default,
                           answers=name_answers(self.interface, self.answer_defense),
                           interface=self.interface, answer_defense=self.answer_defense,
                           top_class_only=self.top_class_only or (
                               self.interface == "label" and not (self.labeled and self.reads_labels)),
                           settings=tuple((self.settings_of or own).items()),
                           control=self.attack if self.control_of else "",
                           labels=self.labeled, reads_labels=self.reads_labels,
                           images=self.transfer_set or "", queries=self.queries, budget=self.query_budget)


class NastyParams(BackdoorParams, CacheParams, DataParams):
    """train_nasty.py: a network with a trained-in defense against distillation."""

    script = "train_nasty.py"
    defense: str = Field("nasty", description="trained-in defense against distillation")

    @property
    def description(self) -> Description:
        own = {key: getattr(self, key) for key in type(self).model_fields
               if key not in NastyParams.model_fields and key not in self.checkpoints()}
        return Description("teacher", kind=self.defense, settings=tuple(own.items()), strength=self.strength)


class PoisonedParams(BackdoorParams, DataParams):
    """train_poisoned.py: a teacher with a backdoor."""

    script = "train_poisoned.py"
    artifacts: ClassVar[tuple[str, ...]] = ("poisoned.json", "poisoned.png")
    trigger: str = Field(description="trigger stamped on the poisoned images")
    poison_rate: float = Field(0.1, gt=0, le=1, description="poisoned images as a fraction of all training images")
    clean_fraction: float = Field(
        0.05, ge=0, lt=1, description="fraction of the training images that is never poisoned")
    surrogate_model: str | None = Field(
        None, description="architecture of the clean classifier `surrogate_resume`; null: `model_name`")
    surrogate_num_channels: int = Field(
        32, ge=1, description="width of the first layer of the clean classifier if it is a `net`")
    surrogate_model_options: ModelOptions = Field(
        {}, description="constructor arguments of a clean classifier that is not in the zoo")
    surrogate_resume: str | None = Field(
        None, description="checkpoint of a clean classifier, against which poisoned images are perturbed; "
                          "required by the trigger `cl`, refused by others")

    @property
    def description(self) -> Description:
        return Description("teacher", kind="poisoned")

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if not self.surrogate_resume:
            keys = "surrogate_model", "surrogate_num_channels", "surrogate_model_options"
            yield from ((key, 'no "surrogate_resume" is given') for key in keys)
        elif (self.surrogate_model or self.model_name) != "net":
            yield "surrogate_num_channels", 'the clean classifier is not a "net"'


class ScratchParams(DataParams):
    """train_scratch.py: a network from labels only."""

    script = "train_scratch.py"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1,
        description="probability of the target that is spread evenly over all classes; 0: one-hot labels")

    @property
    def description(self) -> Description:
        if not self.label_smoothing:
            return Description("teacher", kind="normal")
        return Description("teacher", kind="smoothed", settings=(("label_smoothing", self.label_smoothing),),
                           strength="label_smoothing")


SCRATCH = Stage("scratch", ScratchParams)
NASTY = Stage("nasty", NastyParams, key="defense", methods=defenses.REGISTRY)
KD = Stage("kd", KDParams, key="attack", methods=attacks.REGISTRY)
POISONED = Stage("poisoned", PoisonedParams)
DATAFREE = Stage("datafree", DataFreeParams, key="method", methods=datafree.REGISTRY)
AUDIT = Stage("audit", AuditParams)  # trains through the other stages
STAGES = Stage.ALL

# Keys that identify the stage of a params.json; the first match counts (data-free students also have a teacher).
_SIGNS = {"method": DATAFREE, "attack": KD, "teacher_model": KD, "defense": NASTY, "adversarial_model": NASTY,
          "trigger": POISONED}


def stage_of(values: Mapping[str, Any]) -> Stage:
    """The stage of a params.json, identified by its keys."""
    return next((stage for sign, stage in _SIGNS.items() if sign in values), SCRATCH)


def stage_of_script(script: str) -> Stage:
    """The stage of a script. Raises UserError if there is none."""
    for stage in STAGES.values():
        if stage.script == script:
            return stage
    raise UserError(f"unknown stage script {script}: choose from "
                    f"{', '.join(stage.script for stage in STAGES.values())}")


def recorded_params(script: str, params: dict[str, Any]) -> Params:
    """Validate the parameters that a run recorded. Raises UserError or ValidationError if they are invalid."""
    kind = stage_of_script(script).params_of(params)
    return kind.model_validate(kind.with_new_names(params))


def display_name(method: str) -> str:
    """Display name of an attack or data-free method in tables; the name itself if it is not registered."""
    return next((stage.display_name(method) for stage in STAGES.values() if method in stage.methods), method)


def answer_defense_name(name: str) -> str:
    """Display name of an answer defense in tables; the name itself if it is not registered."""
    from defenses.answers import ANSWER_DEFENSES  # imports torch, which reading params.json does not need

    return ANSWER_DEFENSES.entry(name).display_name if name in ANSWER_DEFENSES else name
