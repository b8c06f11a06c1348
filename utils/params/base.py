"""The keys that several stages share."""
from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError


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
Augmentation = Annotated[
    Literal[(*AUGMENTATIONS, False, True)], BeforeValidator(_zero_or_one),
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


class Params(BaseModel):
    """What every stage reads. The defaults are the published recipe for CIFAR."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    script: ClassVar[str]  # of the stage

    dataset: str = Field(
        description="`cifar10`, `cifar100`, `tiny_imagenet`, `fashion_mnist`, `gtsrb`, `demo` or `folder:PATH`")
    model_name: str = Field(description="the network that is trained, a name of the zoo")
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
    augmentation: Augmentation = True

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


class BackdoorParams(BaseModel):
    """How a backdoor is measured, of the stages that may meet one."""

    trigger: str | None = Field(None, description="trigger whose success on the network is measured")
    target: int = Field(0, ge=0, description="class that the trigger leads to")


class TeacherParams(BaseModel):
    """Whom a student learns from."""

    teacher_model: str = Field(description="architecture of the frozen teacher")
    teacher_num_channels: int = Field(32, ge=1, description="`num_channels` of a teacher that is a `net`")
    teacher_resume: str = Field(description="checkpoint of the teacher: normal, nasty or poisoned")
