"""Parameters that several stages share."""
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
    """Convert 0 and 1, as in the published files, to bool; pass other values on."""
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
    "shift": NamedAugmentation("crop", "random crop without flip, for data whose classes a flip would confuse"),
}
if TYPE_CHECKING:
    _Choice = str | bool
else:
    _Choice = Literal[(*AUGMENTATIONS, False, True)]
Augmentation = Annotated[
    _Choice, BeforeValidator(_zero_or_one),
    WithJsonSchema({"enum": [*AUGMENTATIONS, 0, 1, False, True]}),
    Field(description="augmentation of the training images. 0: none; 1: the recipe of the data set, random crop and "
                      "horizontal flip (Tiny-ImageNet: rotation and flip, GTSRB: random crop); "
                      + "; ".join(f"`{name}`: {named.description}" for name, named in AUGMENTATIONS.items()))]


def _of_unit_pixels(values: list[float]) -> list[float]:
    if max(values) > 1:
        raise PydanticCustomError("unit", "should be at most 1, as pixels are in [0, 1]: divide constants of pixels in "
                                          "[0, 255] by 255")
    return values


def _of_varying_pixels(values: list[float]) -> list[float]:
    """Refuse standard deviations below 1/255 in all channels; a single channel may vary less."""
    if max(values) < 0.0039:
        raise PydanticCustomError("unit", "should be at least 1/255 in some channel, as pixels are in [0, 1]: were "
                                          "constants divided by 255 twice?")
    return values


_Three = Field(min_length=3, max_length=3)
ChannelMeans = Annotated[list[Annotated[float, Field(ge=0, json_schema_extra={"maximum": 1})]], _Three,
                         AfterValidator(_of_unit_pixels)]
ChannelDeviations = Annotated[list[Annotated[float, Field(gt=0, json_schema_extra={"maximum": 1})]], _Three,
                              AfterValidator(_of_unit_pixels), AfterValidator(_of_varying_pixels)]
ModelOptions = dict[str, Any]  # keyword arguments of a network's constructor


@dataclass(frozen=True)
class Description:
    """Description of the network that a run trains. Tables group and name runs by it, not by script or directory.

    `role`: teacher or student. `kind` of a teacher: normal, smoothed (by label smoothing), poisoned, or its trained-in
    defense, whose parameters are `settings`. The other fields describe students and are empty if they do not apply.
    """

    role: Literal["teacher", "student"]
    kind: str = ""
    method: str = ""  # attack or data-free method
    plain: bool = True  # whether `method` is the stage's default
    uses_data: bool = True
    answers: str = ""  # output of the teacher's interface, see `name_answers`
    backdoor_defense: str = "none"
    settings: tuple[tuple[str, Any], ...] = ()  # (name, value) of the parameters of `method` or, for a teacher, `kind`
    strength: str = ""  # name of the setting that is the strength of a trained-in defense
    interface: str = "logits"
    answer_defense: str = "none"
    top_class_only: bool = False  # whether the student learns only the top class of each answer
    control: str = ""  # name of the control whose attack is `method`
    labels: bool = True  # whether the thief has labels
    reads_labels: bool = True  # whether the attack reads the labels
    images: str = ""  # data set of foreign images
    queries: str = "views"
    budget: int | None = None  # number of images sent to the teacher; None: all


def name_answers(interface: str, answer_defense: str) -> str:
    """Name of a teacher's answers in logs and tables, such as `probabilities after mad:0.5`; empty for plain logits."""
    if answer_defense != "none":
        return f"{interface} after {answer_defense}"
    return "" if interface == "logits" else interface


class MethodParams(BaseModel):
    """Parameters of a registered method, declared in its file; params.json has them beside those of the stage."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # published values other than the defaults, by data set
    strength: ClassVar[str] = ""  # parameter of a defense that trades the teacher's accuracy for protection

    @model_validator(mode="before")
    @classmethod
    def _fill_in_published(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        dataset = values.get("dataset")
        return {**(cls.published.get(dataset, {}) if isinstance(dataset, str) else {}), **values}

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        """Pairs (key, reason) of parameters without effect beside the other values; `*` in a key matches any ending."""
        yield from ()


class Params(MethodParams):
    """Parameters of every stage. The defaults are the published recipe for CIFAR."""

    script: ClassVar[str]  # file name of the stage
    artifacts: ClassVar[tuple[str, ...]] = ()  # additional files that runs of the stage write
    weight_stream: ClassVar[str] = "weights"  # seed stream of the initial weights
    renamed: ClassVar[Mapping[str, str]] = {}  # old keys and their present names

    dataset: str = Field(
        description="data set: `cifar10`, `demo` or another of `utils/datasets.py`, or `folder:PATH` for images in "
                    "class folders")
    model_name: str = Field(
        description="network to train: a name of the zoo, `torchvision:NAME`, `timm:NAME` or `package.module:callable`")
    model_options: ModelOptions = Field(
        {}, description="constructor arguments of a network that is not in the zoo")
    num_channels: int = Field(32, ge=1, description="width of the first layer if `model_name` is `net`")
    dropout_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the classifier if `model_name` is `net`")

    learning_rate: float = Field(gt=0, description="initial learning rate")
    batch_size: int = Field(
        128, ge=2, description="images per step, over all devices; a last batch of a single image is dropped")
    num_epochs: int = Field(ge=1, description="number of passes over the training images")

    image_size: int = Field(
        32, ge=8, le=512, description="height and width of `folder:` images after resizing, in pixels")
    background: str = Field(
        "white", pattern="^(white|gray|black|#[0-9a-fA-F]{6})$",
        description="color behind transparent pixels of `folder:` images: `white`, `gray`, `black` or `#rrggbb`")
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field(
        "bilinear", description="filter that resizes `folder:` images")
    mean: ChannelMeans | None = Field(
        None, description="mean of each channel, for pixels in [0, 1]; null: that of the data set")
    std: ChannelDeviations | None = Field(
        None, description="standard deviation of each channel, for pixels in [0, 1]; null: that of the data set. The "
                          "network input is (pixel - `mean`) / `std`")
    seed: int = Field(
        0, ge=0, lt=2**31, description="random seed: initial weights, order of the images, augmentation, ...")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the forward and backward pass; `auto`: bfloat16 if the device is fast at it")
    cuda: Switch = Field(True, description="use a GPU if there is one; `--device` and `--gpu_id` select it")
    num_workers: int = Field(4, ge=0, description="ignored: data loading has no worker processes")
    init_from: str | None = Field(
        None, description="checkpoint of the initial weights; null: random weights")

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_names(cls, values: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(values, dict) and old in values:
                raise ValueError(f'the key "{old}" is now called "{new}"')
        return values

    @classmethod
    def with_new_names(cls, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded parameters of an earlier version with old keys renamed."""
        return {cls.renamed.get(key, key): value for key, value in recorded.items()}

    @property
    def description(self) -> Description:
        """Description of the run's network, for tables."""
        raise NotImplementedError

    @property
    def changeable(self) -> tuple[str, ...]:
        """Keys that may change when a run is resumed: they affect rounding at most or, for num_epochs, the end."""
        return "cuda", "cuda_graph", "compile", "teacher_cache", "num_workers", "num_epochs"

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.model_name != "net":
            yield from ((key, '"model_name" is not "net"') for key in ("num_channels", "dropout_rate"))

    def ineffective_parameter_warnings(self) -> list[str]:
        """One warning for each parameter without effect that is not set to its default. Epochs of `schedule` that are
        never reached give none, since published files have them."""
        values, fields = self.model_dump(), type(self).model_fields
        given = [key for key in fields if key in self.model_fields_set and values[key] != fields[key].default]
        return [f'"{key}" {json.dumps(values[key])} has no effect: {reason}'
                for pattern, reason in self.ineffective_parameters() for key in given if fnmatchcase(key, pattern)]

    @property
    def switches(self) -> dict[str, Any]:
        """The settings that only affect speed."""
        return {key: getattr(self, key) for key in ("compile", "cuda_graph", "teacher_cache") if hasattr(self, key)}

    def checkpoints(self) -> dict[str, str]:
        """Checkpoints by key: `init_from`, and by convention every key that ends in `_resume`."""
        values = self.model_dump()
        return {key: values[key] for key in values if (key == "init_from" or key.endswith("_resume")) and values[key]}


class RecipeParams(Params):
    """Parameters of stages that train on batches of given images."""

    annealing: Literal["steps", "cosine"] = Field(
        "steps", description="learning rate decay. `steps`: by `gamma` at each epoch of `schedule`; `cosine`: half a "
                             "cosine to 0")
    schedule: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="epochs, counted from 0, at which the learning rate is multiplied by `gamma`")
    optimizer: Literal["auto", "sgd", "adam"] = Field(
        "auto", description="SGD (momentum 0.9, weight decay 5e-4) or Adam (no weight decay); `auto`: Adam for `net` "
                            "and `mlp`, else SGD")
    gamma: float = Field(0.1, gt=0, description="factor of the learning rate at each epoch of `schedule`")
    augmentation: Augmentation = True

    @property
    def changeable(self) -> tuple[str, ...]:
        """Without num_epochs if learning rates depend on it."""
        return tuple(key for key in super().changeable if key != "num_epochs" or self.annealing == "steps")

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.annealing == "cosine":
            yield from ((key, '"annealing" is "cosine"') for key in ("schedule", "gamma"))
        elif not self.schedule:
            yield "gamma", '"schedule" is empty'


class DataParams(RecipeParams):
    """Parameters of stages that train on a data set."""

    compile: AutoSwitch = Field(
        "auto", description="torch.compile the networks, which takes about a minute per run; `auto`: no")
    cuda_graph: AutoSwitch = Field(
        "auto", description="record the step of each batch size as a CUDA graph and replay it, on a single GPU; "
                            "`auto`: no. Check your GPU with `python scripts/check_gpu.py` first")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="fraction of the training images held out to select the best epoch; 0: select it "
                                     "on the test images")
    subset_fraction: float = Field(
        1.0, gt=0, le=1,
        description="fraction of the training images that is used; the choice does not depend on `seed`")
    subset_size: int | None = Field(
        None, ge=2, description="number of training images that are used; the choice does not depend on `seed`, and "
                                "smaller subsets lie in larger ones. null: see `subset_fraction`")

    @model_validator(mode="after")
    def _refuse_two_subsets(self) -> Self:
        if self.subset_size is not None and self.subset_fraction < 1:
            raise ValueError('"subset_fraction" and "subset_size" both set the number of training images: give one')
        return self


class TeacherParams(MethodParams):
    """Parameters of a student's frozen teacher and its interface."""

    weight_stream: ClassVar[str] = "student"  # a student must not start from its teacher's initial weights

    teacher_model: str = Field(
        description="architecture of the frozen teacher: a name of the zoo, `torchvision:NAME`, `timm:NAME` or "
                    "`package.module:callable`")
    teacher_num_channels: int = Field(32, ge=1, description="width of the first layer if `teacher_model` is `net`")
    teacher_model_options: ModelOptions = Field(
        {}, description="constructor arguments of a teacher that is not in the zoo")
    teacher_resume: str = Field(description="checkpoint of the teacher: normal, nasty or poisoned")
    interface: str = Field(
        "logits", description="output of the teacher's interface for an image, as `NAME` or `NAME:STRENGTH`; "
                              "`python train_kd.py --help` lists them")
    answer_defense: str = Field(
        "none", description="perturbation of the teacher's probabilities before the interface returns them, as "
                            "`NAME` or `NAME:STRENGTH`; `none`: no perturbation. `python train_kd.py --help` lists "
                            "them")

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.teacher_model != "net":
            yield "teacher_num_channels", '"teacher_model" is not "net"'


class QueryParams(MethodParams):
    """Data of a thief: labels, images and number of queries."""

    labels: Switch = Field(
        True, description="1: the thief has the labels of its images; 0: the student learns from the answers only. "
                          "Foreign images (`transfer_set`) have no labels")
    transfer_set: str | None = Field(
        None, description="data set, such as `cifar100` or `folder:PATH`, whose training images (foreign, unlabeled, "
                          "resized) replace those of `dataset`; the test images stay those of `dataset`")
    queries: Literal["views", "once"] = Field(
        "views", description="queries to the teacher. `views`: every augmented view in every epoch; `once`: each image "
                             "once, not augmented, before the first epoch; all views of an image use this answer. A "
                             "resumed run repeats these queries unless `teacher_cache` is on")
    query_budget: int | None = Field(
        None, ge=2,
        description="number of images that are sent to the teacher and that the student is trained on; null: all")

    @property
    def labeled(self) -> bool:
        """Whether the thief has labels; foreign images have none."""
        return self.labels and self.transfer_set is None
