"""The params.json of an audit. Imports no torch, as params.json files are read without it."""
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from utils.params import DataParams, MethodParams, ModelOptions

LABELED, UNLABELED, NO_DATA = "labeled", "unlabeled", "no_data"
# What the runs of a grid do not take from the audit: it sets these itself, or they have no meaning for them.
OWN = ("checkpoint", "unprotected", "preset", "attacks", "interfaces", "answer_defenses", "thieves", "query_budgets",
       "students", "seeds", "foreign")
OF_MODEL = ("checkpoint", "unprotected", "model_name", "model_options", "num_channels", "interfaces", "answer_defenses",
            "foreign")  # what may differ between the audits of a protected and of an unprotected model
REFUSED = ("seed", "init_from", "subset_size", "subset_fraction")


class StudentNetwork(MethodParams):
    """A network of students."""

    model_name: str = Field(description="as `model_name` of a run")
    num_channels: int = Field(32, ge=1, description="width of the first layer of `net`")
    model_options: ModelOptions = Field(
        {}, description="keyword arguments for the constructor of a network that is not of the zoo")


class AuditParams(DataParams):
    """audit.py: a grid of attacks on one model."""

    script = "audit.py"

    checkpoint: str = Field(
        description="weights of the audited model, whose network `model_name` is: the directory of a run, a checkpoint "
                    "or a `.safetensors` file")
    unprotected: str | None = Field(
        None, description="the same model before it was protected, attacked in the same way for comparison: its "
                          "weights, or the directory of an audit of it, whose students then count here too")
    preset: Literal["core", "full"] = Field(
        "core", description="what is tried where the following keys say nothing. `core`: the strongest attacks, as a "
                            "client meets the model; `full`: all attacks, thieves without data, and several interfaces")
    attacks: list[str | dict[str, Any]] | None = Field(
        None, min_length=1, description="attacks of train_kd.py: names, or objects with `attack` and its parameters")
    interfaces: list[str] | None = Field(
        None, min_length=1, description="what the model's interface returns, as `interface` of train_kd.py; `logits` "
                                        "and `probabilities` are the same to every attack")
    answer_defenses: list[str] = Field(
        ["none"], min_length=1, description="perturbations of the model's answers, as `answer_defense` of train_kd.py, "
                                            "each with each of the interfaces")
    thieves: list[str] | None = Field(
        None, min_length=1, description="what a thief has: `labeled` (training images with their labels), `unlabeled`, "
                                        "the name of a data set of foreign images, or `no_data` (patches of a picture)")
    query_budgets: list[Annotated[int, Field(ge=2)] | None] = Field(
        [None], min_length=1, description="numbers of images that a thief sends to the model and that a student learns "
                                          "from; null: all. A student of fewer images trains for up to five times as "
                                          "many epochs, in batches of at most an eighth of them")
    students: list[StudentNetwork] | None = Field(
        None, min_length=1, description="networks of the students, as objects with `model_name`, `num_channels` and "
                                        "`model_options`; null: the network of the audited model")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [0], min_length=1, description="seeds of the students' runs: initial weights and order of the images")
    foreign: str | None = Field(
        None, description="data set of foreign images: adds to the price how well they are told from test images")

    @model_validator(mode="after")
    def _refuse_what_the_grid_decides(self) -> Self:
        for key in REFUSED:
            if key in self.model_fields_set:
                instead = "seeds" if key == "seed" else "query_budgets" if key.startswith("subset") else "students"
                raise ValueError(f'"{key}" is not of an audit, see "{instead}"')
        for key in ("attacks", "interfaces", "answer_defenses", "thieves", "query_budgets", "students", "seeds"):
            values = getattr(self, key) or []
            if twice := [value for at, value in enumerate(values) if value in values[:at]]:
                entry = twice[0].model_dump() if isinstance(twice[0], StudentNetwork) else twice[0]
                raise ValueError(f'"{key}" has {json.dumps(entry)} twice')
        return self

    @property
    def training(self) -> dict[str, Any]:
        """What was given of the parameters that the students are trained with."""
        left_out = {*OWN, *REFUSED, "model_name", "model_options", "num_channels"}
        return {key: value for key, value in self.model_dump().items()
                if key in self.model_fields_set and key not in left_out}

    @property
    def network(self) -> dict[str, Any]:
        """The audited network, as `students` has them."""
        found: dict[str, Any] = {"model_name": self.model_name}
        if self.model_name == "net":
            found["num_channels"] = self.num_channels
        return found | ({"model_options": self.model_options} if self.model_options else {})

    @property
    def networks(self) -> list[dict[str, Any]]:
        """Those of the students, with what was given of their parameters."""
        return [each.model_dump(exclude_unset=True) for each in self.students or ()] or [self.network]

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.attacks and self.interfaces and self.thieves:
            yield "preset", '"attacks", "interfaces" and "thieves" are given'
