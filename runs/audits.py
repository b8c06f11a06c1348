"""The params.json of an audit. Imports no torch: params.json files are read without it."""
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from utils.params import DataParams, MethodParams, ModelOptions

LABELED, UNLABELED, NO_DATA = "labeled", "unlabeled", "no_data"
# Keys of the audit that its runs do not inherit: the grid sets them, or they do not apply to a run.
OWN = ("checkpoint", "unprotected", "preset", "attacks", "interfaces", "answer_defenses", "thieves", "query_budgets",
       "students", "seeds", "foreign")
OF_MODEL = ("checkpoint", "unprotected", "model_name", "model_options", "num_channels", "interfaces", "answer_defenses",
            "foreign")  # keys that may differ between the audits of a protected and an unprotected model
REFUSED = ("seed", "init_from", "subset_size", "subset_fraction")


class StudentNetwork(MethodParams):
    """Network of the students."""

    model_name: str = Field(
        description="network of the student: a name of the zoo, `torchvision:NAME`, `timm:NAME` or "
                    "`package.module:callable`")
    num_channels: int = Field(32, ge=1, description="width of the first layer if `model_name` is `net`")
    model_options: ModelOptions = Field(
        {}, description="constructor arguments of a network that is not in the zoo")


class AuditParams(DataParams):
    """audit.py: a grid of attacks on one model."""

    script = "audit.py"

    checkpoint: str = Field(
        description="weights of the audited model (architecture: `model_name`): a run directory, a checkpoint or a "
                    "`.safetensors` file")
    unprotected: str | None = Field(
        None, description="the model before it was protected, for comparison: weights, which the same attacks are run "
                          "on, or the directory of an audit, whose students are reused")
    preset: Literal["core", "full"] = Field(
        "core", description="defaults of `attacks`, `interfaces` and `thieves`. `core`: attacks of different kinds, "
                            "on logits; `full`: all attacks, thieves without data too, several interfaces")
    attacks: list[str | dict[str, Any]] | None = Field(
        None, min_length=1, description="attacks of train_kd.py: names, or objects with `attack` and its parameters; "
                                        "null: those of `preset`")
    interfaces: list[str] | None = Field(
        None, min_length=1, description="outputs of the model's interface, as `interface` of train_kd.py; null: those "
                                        "of `preset`. To attacks, `logits` and `probabilities` are equivalent")
    answer_defenses: list[str] = Field(
        ["none"], min_length=1, description="perturbations of the model's answers, as `answer_defense` of train_kd.py; "
                                            "each is combined with each of `interfaces`")
    thieves: list[str] | None = Field(
        None, min_length=1, description="data of the thieves: `labeled` (training images with labels), `unlabeled` "
                                        "(without), the name of a data set of foreign images, or `no_data` (patches "
                                        "of a picture); null: those of `preset`")
    query_budgets: list[Annotated[int, Field(ge=2)] | None] = Field(
        [None], min_length=1, description="numbers of images that a thief sends to the model and trains a student on; "
                                          "null: all. With fewer images a student trains for up to five times as "
                                          "many epochs, with batches of at most an eighth of the images")
    students: list[StudentNetwork] | None = Field(
        None, min_length=1, description="networks of the students, as objects with `model_name`, `num_channels` and "
                                        "`model_options`; null: the network of the audited model")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [0], min_length=1, description="seeds of the students: initial weights, order of the images, augmentation")
    foreign: str | None = Field(
        None, description="data set of foreign images, for one more metric of the price: how well confidence separates "
                          "them from test images")

    @model_validator(mode="after")
    def _refuse_what_the_grid_decides(self) -> Self:
        for key in REFUSED:
            if key in self.model_fields_set:
                instead = "seeds" if key == "seed" else "query_budgets" if key.startswith("subset") else "students"
                raise ValueError(f'"{key}" is no key of an audit: use "{instead}"')
        for key in ("attacks", "interfaces", "answer_defenses", "thieves", "query_budgets", "students", "seeds"):
            values = getattr(self, key) or []
            if twice := [value for at, value in enumerate(values) if value in values[:at]]:
                entry = twice[0].model_dump() if isinstance(twice[0], StudentNetwork) else twice[0]
                raise ValueError(f'"{key}" has {json.dumps(entry)} twice')
        return self

    @property
    def training(self) -> dict[str, Any]:
        """The given training parameters of the students."""
        left_out = {*OWN, *REFUSED, "model_name", "model_options", "num_channels"}
        return {key: value for key, value in self.model_dump().items()
                if key in self.model_fields_set and key not in left_out}

    @property
    def network(self) -> dict[str, Any]:
        """The audited network, in the format of `students`."""
        found: dict[str, Any] = {"model_name": self.model_name}
        if self.model_name == "net":
            found["num_channels"] = self.num_channels
        return found | ({"model_options": self.model_options} if self.model_options else {})

    @property
    def networks(self) -> list[dict[str, Any]]:
        """The networks of the students, with their given parameters; without `students`, the audited network."""
        return [each.model_dump(exclude_unset=True) for each in self.students or ()] or [self.network]

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.attacks and self.interfaces and self.thieves:
            yield "preset", '"attacks", "interfaces" and "thieves" are given'
