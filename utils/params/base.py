"""The keys that several stages share."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self


def _zero_or_one(value: Any) -> Any:
    """The published files write switches as 0 and 1; true and false mean the same."""
    return bool(value) if type(value) is int and value in (0, 1) else value


Switch = Annotated[bool, BeforeValidator(_zero_or_one), WithJsonSchema({"enum": [0, 1, False, True]})]
AutoSwitch = Annotated[Literal["auto", False, True], BeforeValidator(_zero_or_one),
                       WithJsonSchema({"enum": ["auto", 0, 1, False, True]})]


class NamedAugmentation(NamedTuple):
    """A value of `augmentation` other than 0 and 1."""

    recipe: str  # of `utils.data.TrainBatches`
    description: str


# To add one, write a line here and, if its recipe is new, the recipe in `utils.data.TrainBatches`.
AUGMENTATIONS = {
    "shift": NamedAugmentation("crop", "random crop without flip, for classes that are mirror images of each other"),
}
if TYPE_CHECKING:
    _Choice = str | bool
else:
    _Choice = Literal[(*AUGMENTATIONS, False, True)]
Augmentation = Annotated[
    _Choice, BeforeValidator(_zero_or_one),
    WithJsonSchema({"enum": [*AUGMENTATIONS, 0, 1, False, True]}),
    Field(description="augmentation of the images that the network learns from. 0: none; 1: the recipe of the data "
                      "set, random crop and horizontal flip (Tiny-ImageNet: rotation and flip, GTSRB: random crop); "
                      + "; ".join(f"`{name}`: {named.description}" for name, named in AUGMENTATIONS.items()))]


def _of_unit_pixels(values: list[float]) -> list[float]:
    if max(values) > 1:
        raise PydanticCustomError("unit", "should be at most 1, as pixels are in [0, 1]: divide constants of pixels in "
                                          "[0, 255] by 255")
    return values


def _of_varying_pixels(values: list[float]) -> list[float]:
    """Networks whose pixels are in [0, 255] have a standard deviation of 1/255. A single channel may vary less."""
    if max(values) < 0.0039:
        raise PydanticCustomError("unit", "should not be below 1/255, a grey level, in every channel, as pixels are in "
                                          "[0, 1]: were constants divided by 255 twice?")
    return values


_Three = Field(min_length=3, max_length=3)
ChannelMeans = Annotated[list[Annotated[float, Field(ge=0, json_schema_extra={"maximum": 1})]], _Three,
                         AfterValidator(_of_unit_pixels)]
ChannelDeviations = Annotated[list[Annotated[float, Field(gt=0, json_schema_extra={"maximum": 1})]], _Three,
                              AfterValidator(_of_unit_pixels), AfterValidator(_of_varying_pixels)]
ModelOptions = dict[str, Any]  # keyword arguments of a network's constructor


@dataclass(frozen=True)
class Description:
    """What a run makes, for tables: they group and name runs by this, never by script, directory or method.

    `role`: teacher or student. `kind` of a teacher: normal, smoothed (by label smoothing), poisoned, or its trained-in
    defense, whose parameters are `settings`. The other fields are of a student, empty where they do not apply.
    """

    role: Literal["teacher", "student"]
    kind: str = ""
    method: str = ""  # attack or data-free method
    plain: bool = True  # by the stage's default method
    uses_data: bool = True
    answers: str = ""  # what the teacher lets out, see `name_answers`
    backdoor_defense: str = "none"
    settings: tuple[tuple[str, Any], ...] = ()  # parameters of the method, of a teacher those of `kind`, by name
    strength: str = ""  # the one of the settings of a trained-in defense that is its strength
    interface: str = "logits"
    answer_defense: str = "none"
    top_class_only: bool = False  # whether the student learns no more of an answer than its top class
    control: str = ""  # what replaces the answers, in a control of the attack `method`
    labels: bool = True  # whether the thief has labels
    reads_labels: bool = True  # and the attack reads them
    images: str = ""  # the data set of foreign images
    queries: str = "views"
    budget: int | None = None  # images that are sent to the teacher


def name_answers(interface: str, answer_defense: str) -> str:
    """What a teacher lets out, for logs and tables: `label`, `probabilities after mad:0.5`; empty for its logits."""
    if answer_defense != "none":
        return f"{interface} after {answer_defense}"
    return "" if interface == "logits" else interface


class MethodParams(BaseModel):
    """Parameters of a registered method, beside its code; they join those of the stage in params.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by data set: values other than the defaults
    strength: ClassVar[str] = ""  # of a defense: the parameter that trades the teacher's accuracy for protection

    @model_validator(mode="before")
    @classmethod
    def _fill_in_published(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        dataset = values.get("dataset")
        return {**(cls.published.get(dataset, {}) if isinstance(dataset, str) else {}), **values}

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        """Parameters that nothing reads beside the other values, each with the reason; `*` stands for any ending."""
        yield from ()


class Params(MethodParams):
    """What every stage reads. The defaults are the published recipe for CIFAR."""

    script: ClassVar[str]  # of the stage
    artifacts: ClassVar[tuple[str, ...]] = ()  # files that runs of the stage write beside those of every run
    weight_stream: ClassVar[str] = "weights"  # seed stream of the initial weights
    renamed: ClassVar[Mapping[str, str]] = {}  # keys of earlier versions, and what they are called now

    dataset: str = Field(
        description="data set: `cifar10`, `demo` or another of `utils/datasets.py`, or `folder:PATH`, images by class "
                    "folder")
    model_name: str = Field(
        description="network to train: a name of the zoo, `torchvision:NAME`, `timm:NAME` or `package.module:callable`")
    model_options: ModelOptions = Field(
        {}, description="keyword arguments for the constructor of a network that is not of the zoo")
    num_channels: int = Field(32, ge=1, description="width of the first layer of `net`")
    dropout_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier of `net`")

    learning_rate: float = Field(gt=0, description="at epoch 0")
    batch_size: int = Field(
        128, ge=2, description="images a step, over all devices together; a rest of a single image is left out")
    num_epochs: int = Field(ge=1, description="passes over the training images")

    image_size: int = Field(32, ge=8, le=512, description="height and width that `folder:` images are resized to")
    background: str = Field(
        "white", pattern="^(white|gray|black|#[0-9a-fA-F]{6})$",
        description="color behind transparent pixels of `folder:` images: `white`, `gray`, `black` or `#rrggbb`")
    mean: ChannelMeans | None = Field(
        None, description="mean of each channel, of pixels in [0, 1]; null: the data set's own")
    std: ChannelDeviations | None = Field(
        None, description="standard deviation of each channel, of pixels in [0, 1]; null: the data set's own. The "
                          "networks see (pixel - `mean`) / `std`")
    seed: int = Field(
        0, ge=0, lt=2**31, description="of all that is random: initial weights, order of the images, augmentation, ...")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="arithmetic of the networks; `auto`: bfloat16 where the hardware is fast at it")
    cuda: Switch = Field(True, description="use a GPU if there is one; `--device` and `--gpu_id` choose which")
    num_workers: int = Field(4, ge=0, description="ignored: the data needs no worker processes")
    init_from: str | None = Field(
        None, description="checkpoint whose weights the network starts from, instead of random ones")

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(values, dict) and old in values:
                raise ValueError(f'the key "{old}" is now called "{new}"')
        return values

    @classmethod
    def with_new_names(cls, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that a run of an earlier version recorded, under the names of this version."""
        return {cls.renamed.get(key, key): value for key, value in recorded.items()}

    @property
    def description(self) -> Description:
        """What a run makes, for tables."""
        raise NotImplementedError

    @property
    def changeable(self) -> tuple[str, ...]:
        """What a run may go on with another value of: rounding at most depends on it, or, for num_epochs, the end."""
        return "cuda", "cuda_graph", "compile", "teacher_cache", "num_workers", "num_epochs"

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.model_name != "net":
            yield from ((key, '"model_name" is not "net"') for key in ("num_channels", "dropout_rate"))

    def ineffective_parameter_warnings(self) -> list[str]:
        """A text for each parameter that was set to another value than its default and has no effect. Defaults and
        epochs of `schedule` that are never reached, which published files carry along, are not named."""
        values, fields = self.model_dump(), type(self).model_fields
        given = [key for key in fields if key in self.model_fields_set and values[key] != fields[key].default]
        return [f'"{key}" {json.dumps(values[key])} has no effect: {reason}'
                for pattern, reason in self.ineffective_parameters() for key in given if fnmatchcase(key, pattern)]

    @property
    def switches(self) -> dict[str, Any]:
        """What was asked for of the means that only speed a run up."""
        return {key: getattr(self, key) for key in ("compile", "cuda_graph", "teacher_cache") if hasattr(self, key)}

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
    augmentation: Augmentation = True

    @property
    def changeable(self) -> tuple[str, ...]:
        """Without num_epochs where learning rates depend on it."""
        return tuple(key for key in super().changeable if key != "num_epochs" or self.annealing == "steps")


    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.annealing == "cosine":
            yield from ((key, '"annealing" is "cosine"') for key in ("schedule", "gamma"))
        elif not self.schedule:
            yield "gamma", '"schedule" is empty'


class DataParams(RecipeParams):
    """What the stages that learn from a data set read."""

    compile: AutoSwitch = Field(
        "auto", description="torch.compile for the networks, about a minute each time; `auto`: no")
    cuda_graph: AutoSwitch = Field(
        "auto", description="replay each step as one CUDA graph; `auto`: on one GPU, where it can be recorded")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the training images held out to choose the best epoch; 0: the test set")
    subset_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training images that is used, the same ones whatever the seed")
    subset_size: int | None = Field(
        None, ge=2, description="number of training images that are used, the same ones whatever the seed and among "
                                "those of a larger number; null: as `subset_fraction` says")

    @model_validator(mode="after")
    def _refuse_two_subsets(self) -> Self:
        if self.subset_size is not None and self.subset_fraction < 1:
            raise ValueError('"subset_fraction" and "subset_size" both say how many training images are used')
        return self


class TeacherParams(MethodParams):
    """The frozen teacher of a student, and what its interface lets out."""

    weight_stream: ClassVar[str] = "student"  # a student must not start from the weights from which its teacher started

    teacher_model: str = Field(
        description="architecture of the frozen teacher: as `model_name`")
    teacher_num_channels: int = Field(32, ge=1, description="width of the teacher's first layer if it is a `net`")
    teacher_model_options: ModelOptions = Field(
        {}, description="keyword arguments for the teacher's constructor if it is not a network of the zoo")
    teacher_resume: str = Field(description="checkpoint of the teacher: normal, nasty or poisoned")
    interface: str = Field(
        "logits", description="what the teacher's interface returns for an image, as `NAME` or `NAME:STRENGTH`: "
                              "`logits`, or one of those that `python train_kd.py --help` lists")
    answer_defense: str = Field(
        "none", description="perturbation of the teacher's probabilities before the interface returns them, as "
                            "`NAME` or `NAME:STRENGTH`; `none`: the answers stay as they are")

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.teacher_model != "net":
            yield "teacher_num_channels", '"teacher_model" is not "net"'


class QueryParams(MethodParams):
    """What a thief has: labels or not, its own or foreign images, and a number of queries."""

    labels: Switch = Field(
        True, description="whether the thief has the labels of its images; 0, and for foreign images: the answers are "
                          "all it learns from")
    transfer_set: str | None = Field(
        None, description="data set, such as `cifar100` or `folder:PATH`, whose training images the student learns "
                          "from in place of those of `dataset`: foreign, unlabeled, resized. The test images "
                          "are those of `dataset`")
    queries: Literal["views", "once"] = Field(
        "views", description="what is sent to the teacher. `views`: every augmented view, every epoch; `once`: each "
                             "image once, not augmented, before the first epoch; its answer holds for all views of it. "
                             "A run that is continued asks again, unless `teacher_cache` has kept the answers")
    query_budget: int | None = Field(
        None, ge=2, description="number of images that are sent to the teacher, and that the student learns from; "
                                "null: all of them")

    @property
    def labeled(self) -> bool:
        """Whether the thief has labels: those of foreign images are not those of the data set."""
        return self.labels and self.transfer_set is None
