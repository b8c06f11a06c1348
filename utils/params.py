"""What a params.json may say, per stage: every key with its type, range and default.

    python -m utils.params              # the table of parameters, as in the README
    python -m utils.params scratch      # JSON schema for an editor; also: nasty, kd, poisoned, zskt, ood
"""
from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from utils.errors import UserError


def _zero_or_one(value: Any) -> Any:
    """The published files write switches as 0 and 1; true and false mean the same."""
    return bool(value) if type(value) is int and value in (0, 1) else value


Switch = Annotated[bool, BeforeValidator(_zero_or_one), WithJsonSchema({"enum": [0, 1, False, True]})]
AutoSwitch = Annotated[Literal["auto", False, True], BeforeValidator(_zero_or_one),
                       WithJsonSchema({"enum": ["auto", 0, 1, False, True]})]


class Params(BaseModel):
    """What every stage reads. The defaults are the published recipe for CIFAR."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    script: ClassVar[str]  # of the stage

    dataset: str = Field(
        description="`cifar10`, `cifar100`, `tiny_imagenet`, `fashion_mnist`, `demo` or `folder:PATH`")
    model_name: str = Field(description="the network that is trained, a name of the zoo")
    num_channels: int = Field(32, ge=1, description="width of the first layer of `net`")
    dropout_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier of `net`")

    learning_rate: float = Field(gt=0, description="at epoch 0")
    batch_size: int = Field(
        128, ge=2, description="images a step, over all devices together; a rest of a single image is left out")
    num_epochs: int = Field(ge=1, description="passes over the training images")

    image_size: int = Field(32, ge=8, le=512, description="height and width that `folder:` images are resized to")
    mean: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=3, max_length=3)] | None = Field(
        None, description="of each channel, of pixels in [0, 1]; null: the data set's own")
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = Field(
        None, description="likewise; the networks see (pixel - `mean`) / `std`")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of all that is random: initial weights, order of the images, augmentation, ...")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic of the networks; `auto`: bfloat16 where the hardware is fast at it")
    cuda: Switch = Field(True, description="use a GPU if there is one; `--device` and `--gpu_id` choose which")
    num_workers: int = Field(4, ge=0, description="ignored: the data needs no worker processes")
    init_from: str | None = Field(
        None, description="checkpoint whose weights the network starts from, instead of random ones")

    @property
    def changeable(self) -> tuple[str, ...]:
        """What a run may go on with another value of: rounding at most depends on it, or, for num_epochs, the end."""
        return "cuda", "cuda_graph", "compile", "teacher_cache", "num_workers", "num_epochs"

    def checkpoints(self) -> dict[str, str]:
        """The checkpoints that the parameters name: `init_from`, and by convention every key that ends in `_resume`."""
        values = self.model_dump()
        return {key: values[key] for key in values if (key == "init_from" or key.endswith("_resume")) and values[key]}


class RecipeParams(Params):
    """What every stage reads that learns from batches of given images."""

    annealing: Literal["steps", "cosine"] = Field(
        "steps", description="how the learning rate falls: at the epochs of `schedule`, or to 0 along half a cosine")
    schedule: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="epochs (counted from 0) at which the learning rate is multiplied by `gamma`")
    optimizer: Literal["auto", "sgd", "adam"] = Field(
        "auto", description="SGD (momentum 0.9, weight decay 5e-4) or Adam; `auto`: Adam for `net` and `mlp`, else SGD")
    gamma: float = Field(0.1, gt=0, description="factor of the learning rate at each epoch of `schedule`")
    augmentation: Switch = Field(True, description="random crop (Tiny-ImageNet: rotation) and horizontal flip")


    @property
    def changeable(self) -> tuple[str, ...]:
        """Without num_epochs where learning rates depend on it."""
        return tuple(key for key in super().changeable if key != "num_epochs" or self.annealing == "steps")


class DataParams(RecipeParams):
    """What the stages that learn from a data set read."""

    compile: AutoSwitch = Field(
        "auto", description="torch.compile for the networks, about a minute each time; `auto`: no (see BENCHMARKS.md)")
    cuda_graph: AutoSwitch = Field(
        "auto", description="replay each step as one CUDA graph; `auto`: on one GPU, where it can be recorded")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the training images held out to choose the best epoch; 0: the test set")
    subset_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training images that is used, the same ones whatever the seed")


class FrozenParams(DataParams):
    """What the stages with a frozen network read."""

    temperature: float = Field(gt=0, description="temperature T of the softened outputs in the KL term")
    teacher_cache: Switch = Field(
        False, description="keep the frozen network's logits of each view of an image, for all runs, in `data/cache`")


class ScratchParams(DataParams):
    """train_scratch.py: a network from labels alone."""

    script = "train_scratch.py"


class BackdoorParams(BaseModel):
    """How a backdoor is measured, of the stages that may meet one."""

    trigger: str | None = Field(None, description="trigger whose success on the network is measured")
    target: int = Field(0, ge=0, description="class that the trigger leads to")


class PoisonedParams(BackdoorParams, DataParams):
    """train_poisoned.py: a teacher that carries a backdoor."""

    script = "train_poisoned.py"
    trigger: str = Field(description="what is stamped on the poisoned images")
    poison_rate: float = Field(0.1, gt=0, le=1, description="images that are poisoned, in parts of all training images")
    clean_fraction: float = Field(0.05, ge=0, lt=1, description="training images that stay clean in any case, likewise")
    surrogate_model: str | None = Field(
        None, description="architecture of the clean classifier, null: `model_name`")
    surrogate_num_channels: int = Field(32, ge=1, description="`num_channels` of a clean classifier that is a `net`")
    surrogate_resume: str | None = Field(
        None, description="checkpoint of a clean classifier: poisoned images are made adversarial to it (`cl`)")


class NastyParams(FrozenParams):
    """train_nasty.py: a teacher that undermines its students."""

    script = "train_nasty.py"
    adversarial_model: str = Field(description="architecture of the frozen adversary, as a rule `model_name`")
    adversarial_num_channels: int = Field(32, ge=1, description="`num_channels` of an adversary that is a `net`")
    adversarial_resume: str = Field(description="checkpoint of the adversary: a normally trained teacher")
    weight: float = Field(ge=0, description="weight of the term that drives the nasty teacher from the adversary")


class KDParams(BackdoorParams, FrozenParams):
    """train_kd.py: a student of a frozen teacher."""

    script = "train_kd.py"
    teacher_model: str = Field(description="architecture of the frozen teacher")
    teacher_num_channels: int = Field(32, ge=1, description="`num_channels` of a teacher that is a `net`")
    teacher_resume: str = Field(description="checkpoint of the teacher, normal or nasty")
    alpha: float = Field(ge=0, le=1, description="weight of the KL term; the cross-entropy has 1 - `alpha`")


class DataFreeParams(BackdoorParams, Params):
    """train_datafree.py: a student that learns from a teacher alone, without a data set. What all methods read."""

    script = "train_datafree.py"
    method: str

    @property
    def changeable(self) -> tuple[str, ...]:
        """Without num_epochs: learning rates and the defences count from the end."""
        return tuple(key for key in super().changeable if key != "num_epochs")

    teacher_model: str = Field(description=KDParams.model_fields["teacher_model"].description)
    teacher_num_channels: int = Field(32, ge=1, description=KDParams.model_fields["teacher_num_channels"].description)
    teacher_resume: str = Field(description=KDParams.model_fields["teacher_resume"].description)

    defense: Literal["none", "sv", "sr", "sv+sr", "auto"] = Field(
        "none", description="ABD: shuffling vaccine, self-retrospection, or `sr` where no good vaccine is found")
    sv_weight: float = Field(0.1, ge=0, description="weight of the vaccine's term")
    sv_layers: int = Field(5, ge=1, description="convolutions that the vaccine shuffles, counted from the last")
    sv_members: int = Field(3, ge=1, description="shuffled copies of the teacher")
    sv_batches: int = Field(0, ge=0, description="batches that judge a vaccine before it is used; 0: none, `auto`: 50")
    sr_epochs: int = Field(2, ge=1, description="last epochs, in which self-retrospection is on")
    sr_learning_rate: float = Field(5e-4, gt=0, description="at the first of them, falling to 0 along half a cosine")
    sr_rounds: int = Field(10, ge=1, description="steps that seek the perturbation")
    sr_source: Literal["teacher", "student"] = Field(
        "teacher", description="the network that the perturbation is sought against")
    sr_weight: float = Field(1.0, ge=0, description="weight of the hypergradient beside the gradient of distillation")
    sr_radius: float | None = Field(None, gt=0, description="largest L2 norm of the perturbation, in normalised units")
    sr_batch_norm: Literal["frozen", "train"] = Field(
        "frozen", description="whether perturbed images enter the running statistics of the student")


class ZSKTParams(DataFreeParams):
    """Zero-shot knowledge transfer. The defaults are ABD's for CIFAR-10."""

    method: Literal["zskt"] = Field(description="how the student learns without data")
    learning_rate: float = Field(2e-3, gt=0, description="of the student, falling to 0 along half a cosine")
    num_epochs: int = Field(400, ge=1, description="intervals of `pseudo_batches`")
    temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs")
    pseudo_batches: int = Field(200, ge=1, description="batches that an epoch generates")
    student_steps: int = Field(10, ge=1, description="steps of the student on each of them")
    latent_size: int = Field(100, ge=1, description="numbers that the generator makes an image of")
    generator_learning_rate: float = Field(1e-3, gt=0, description="likewise, of the generator")
    attention_weight: float = Field(250.0, ge=0, description="weight of the attention losses; 0 without groups")
    clip_norm: float = Field(5.0, gt=0, description="largest norm of a gradient, of student and generator")
    sr_weight: float = Field(0.1, ge=0, description=DataFreeParams.model_fields["sr_weight"].description)
    sr_epochs: int = Field(3, ge=1, description=DataFreeParams.model_fields["sr_epochs"].description)


class OoDParams(DataFreeParams, RecipeParams):
    """Distillation on patches of one picture. The defaults are ABD's for CIFAR-10."""

    method: Literal["ood"] = Field(description="how the student learns without data")
    optimizer: Literal["auto", "sgd", "adam"] = Field(
        "adam", description=RecipeParams.model_fields["optimizer"].description)
    learning_rate: float = Field(1e-3, gt=0, description=Params.model_fields["learning_rate"].description)
    schedule: list[Annotated[int, Field(ge=0)]] = Field(
        [150], description=RecipeParams.model_fields["schedule"].description)
    gamma: float = Field(0.5, gt=0, description=RecipeParams.model_fields["gamma"].description)
    num_epochs: int = Field(300, ge=1, description="passes over the patches")
    batch_size: int = Field(512, ge=2, description=Params.model_fields["batch_size"].description)
    temperature: float = Field(8.0, gt=0, description="temperature T of the softened outputs")
    picture: str | None = Field(None, description="file of a picture; null: one is drawn")
    patches: int = Field(50_000, ge=2, description="patches that are cut out of it")
    patch_kinds: list[Literal["colour", "grey", "blob"]] = Field(
        ["colour"], min_length=1, description="what becomes of them, in turns: `colour`, `grey`, `blob`")
    balance: Switch = Field(False, description="choose patches that the teacher takes for all classes alike")
    cutmix: Switch = Field(True, description="mix each batch with itself")


METHODS: dict[str, type[DataFreeParams]] = {"zskt": ZSKTParams, "ood": OoDParams}

STAGES: dict[str, type[Params]] = {"scratch": ScratchParams, "nasty": NastyParams, "kd": KDParams,
                                   "poisoned": PoisonedParams, **METHODS}
ParamsType = TypeVar("ParamsType", bound=Params)


def load_params(path: Path, kind: type[ParamsType] | Mapping[str, type[ParamsType]],
                overrides: dict[str, Any] | None = None) -> ParamsType:
    """Read and check a params.json; `overrides`, of the command line, replace its values.

    kind: what it holds or, where that depends on its key `method`, what it holds for each method. Raises UserError that
    names each wrong key, its value and what is allowed.
    """
    values, overrides = _read_json(path), overrides or {}
    if isinstance(kind, Mapping):
        method = (values | overrides).get("method")
        if method not in kind:
            found = f'"method" is {json.dumps(method)}' if method is not None else 'the key "method" is missing'
            raise UserError(f"{path}: {found}: choose from {', '.join(kind)}")
        kind = kind[method]
    try:
        return kind.model_validate(values | overrides)
    except ValidationError as error:
        other = next((other.script for other in STAGES.values() if _fits(values, other)), kind.script)
        file = str(path) if other == kind.script else f"{path} is for {other}, not for {kind.script}"
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            place = "--set" if problem["loc"] and problem["loc"][0] in overrides else file
            problems.setdefault(place, []).append(_describe(problem, kind))
        raise UserError("; ".join(f"{place}: {'; '.join(texts)}" for place, texts in problems.items())) from None


def _fits(values: dict[str, Any], kind: type[Params]) -> bool:
    try:
        kind.model_validate(values)
    except ValidationError:
        return False
    return True


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` words of --set as a dict. A value is JSON; what is not JSON is a string."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes KEY=VALUE, not {assignment!r}")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def changed_keys(old: dict[str, Any], new: Params) -> list[str]:
    """The parameters in which two runs differ, as `key (old -> new)`, without those that change no result."""
    defaults = {key: field.get_default() for key, field in type(new).model_fields.items() if not field.is_required()}
    then, now = defaults | old, new.model_dump()  # a key that is newer than the old run has its default
    return [f"{key} ({json.dumps(then.get(key))} -> {json.dumps(now.get(key))})"
            for key in {**now, **then}
            if key not in new.changeable and then.get(key) != now.get(key)]


def _read_json(path: Path) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: the key {json.dumps(key)} appears twice")
        return dict(pairs)

    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file: --save_path names the directory that holds a params.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: --save_path names a directory that holds a params.json") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Expecting ',' delimiter":  # missing where the value before ends, not where the next key is
            error = json.JSONDecodeError("Expecting ',' after this", error.doc, len(error.doc[:error.pos].rstrip()))
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, {{\"key\": value, ...}}")
    return values


def _describe(problem: Any, kind: type[Params]) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else "?"
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}"{_hint(key, kind)}'
    if problem["type"] == "missing":
        return f'the key "{key}" is missing'
    message = problem["msg"].replace("Input should", "should")
    if problem["type"] == "literal_error":  # in the words of JSON
        message = message.replace("False", "0").replace("True", "1")
    if problem["type"] == "list_type":
        message += ", such as [1,2]"
    inside = "".join(f"[{part}]" for part in problem["loc"][1:])
    return f'"{key}"{inside} is {json.dumps(problem["input"])}: {message}'


def _hint(key: str, kind: type[Params]) -> str:
    owners = dict.fromkeys(other.script if other.script != kind.script else f'"method" "{name}"'
                           for name, other in STAGES.items() if key in other.model_fields)
    if owners:
        return f" ({' and '.join(owners)} would read it)"
    near = difflib.get_close_matches(key, kind.model_fields, n=1)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (known: {', '.join(kind.model_fields)})"


def markdown_table() -> str:
    """The parameters of all stages as the table of the README."""
    rows: dict[tuple[str, ...], list[str]] = {}  # the stages that have a key with the same type, default and meaning
    for stage, kind in STAGES.items():
        schemas = kind.model_json_schema()["properties"]
        for name, field in kind.model_fields.items():
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            row = name, _type_name(schemas[name]), default, field.description
            rows.setdefault(row, []).append(stage)
    lines = ["| key | type | default | stage | what |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(name for name, *_ in rows))
    for (name, kind, default, what), stages in sorted(rows.items(), key=lambda row: names.index(row[0][0])):
        owners = "all" if len(stages) == len(STAGES) else ", ".join(stages)
        lines.append(f"| `{name}` | {kind} | {default} | {owners} | {what} |")
    return "\n".join(lines)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " / ".join(f"`{choice}`" if isinstance(choice, str) else str(choice) for choice in schema["enum"]
                          if not isinstance(choice, bool))
    schema = schema.get("anyOf", [schema])[0]  # an optional value: what it is when it is not null
    names = {"integer": "int", "number": "float", "string": "string"}
    return f"list of {names[schema['items']['type']]}" if schema["type"] == "array" else names[schema["type"]]


if __name__ == "__main__":
    if not sys.argv[1:]:
        print(markdown_table())
    elif sys.argv[1] in STAGES:
        print(json.dumps(STAGES[sys.argv[1]].model_json_schema(), indent=2))
    else:
        print(f"error: choose from {', '.join(STAGES)}, or nothing for the table", file=sys.stderr)
        sys.exit(2)
