"""The keys of train_datafree.py: those of every method and, by its name, those of each."""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from utils.params.base import Augmentation, BackdoorParams, Params, RecipeParams, Switch, TeacherParams

# Keys that several methods have with defaults of their own.
SREpochs = Annotated[int, Field(ge=1, description="last epochs, in which self-retrospection is on")]
SRWeight = Annotated[float, Field(ge=0, description="weight of the hypergradient beside the gradient of distillation")]
LatentSize = Annotated[int, Field(ge=1, description="numbers that the generator makes an image of")]
StudentSteps = Annotated[int | None, Field(ge=1, description="steps of the student in a round; null: `epoch_steps`")]
SynthesisSteps = Annotated[int, Field(ge=1, description="steps that make images, in a round")]
SynthesisRate = Annotated[float, Field(gt=0, description="learning rate of what makes them: generator, or pixels")]
BatchNormWeight = Annotated[float, Field(ge=0, description="weight of the loss of batch-norm statistics")]
AdversarialWeight = Annotated[float, Field(ge=0, description="weight of the disagreement of student and teacher")]
ActivationWeight = Annotated[float, Field(ge=0, description="weight of the activation before the classifier")]
METHOD = "how the student learns without data"


class DataFreeParams(BackdoorParams, TeacherParams, Params):
    """train_datafree.py: a student that learns from a teacher alone, without a data set. What all methods read."""

    script = "train_datafree.py"
    method: str

    @property
    def changeable(self) -> tuple[str, ...]:
        """Without num_epochs: learning rates and the defences count from the end."""
        return tuple(key for key in super().changeable if key != "num_epochs")

    defense: Literal["none", "sv", "sr", "sv+sr", "auto"] = Field(
        "none", description="ABD: shuffling vaccine, self-retrospection, or `sr` where no good vaccine is found")
    sv_weight: float = Field(0.1, ge=0, description="weight of the vaccine's term")
    sv_layers: int | None = Field(
        None, ge=1, description="convolutions that the vaccine shuffles, from the last on; null: 5, or half of fewer")
    sv_members: int = Field(3, ge=1, description="shuffled copies of the teacher")
    sv_batches: int = Field(
        0, ge=0, description="batches that judge a vaccine before it is used, up to 8 times; 0: none, in `auto` 50")
    sv_tail: float = Field(0.02, ge=0, lt=1, description="share of tail samples above which a vaccine is accepted")
    sr_epochs: SREpochs = 2
    sr_learning_rate: float = Field(5e-4, gt=0, description="at the first of them, falling to 0 along half a cosine")
    sr_rounds: int = Field(10, ge=1, description="steps of Adam that seek the perturbation")
    sr_perturbation_rate: float = Field(0.1, gt=0, description="their learning rate, in units of normalised images")
    sr_start: float = Field(0.01, ge=0, description="standard deviation of the noise they start from; published: 0")
    sr_source: Literal["teacher", "student"] = Field(
        "teacher", description="the network that the perturbation is sought against")
    sr_weight: SRWeight = 1.0
    sr_penalty: float = Field(1e-3, ge=0, description="weight of the perturbation's squared L2 norm")
    sr_radius: float | None = Field(None, gt=0, description="largest L2 norm of the perturbation, in normalised units")
    sr_batch_norm: Literal["frozen", "train"] = Field(
        "frozen", description="whether perturbed images enter the running statistics of the student")
    sr_portion: float = Field(0.02, gt=0, le=1, description="share of a batch that is perturbed to unlearn it")
    sr_detach: Switch = Field(True, description="move perturbed outputs to clean ones, and not both to each other")
    sr_steps: int = Field(5, ge=1, description="fixed-point iterations of the hypergradient")
    sr_eta: float = Field(0.1, gt=0, description="their step size")


class ZSKTParams(DataFreeParams):
    """Zero-shot knowledge transfer. The defaults are ABD's for CIFAR-10."""

    method: Literal["zskt"] = Field(description=METHOD)
    learning_rate: float = Field(2e-3, gt=0, description="of the student, falling to 0 along half a cosine")
    num_epochs: int = Field(400, ge=1, description="intervals of `pseudo_batches`")
    temperature: float = Field(1.0, gt=0, description="temperature T of the softened outputs")
    pseudo_batches: int = Field(200, ge=1, description="batches that an epoch generates")
    student_steps: int = Field(10, ge=1, description="steps of the student on each of them")
    latent_size: LatentSize = 100
    generator_learning_rate: float = Field(1e-3, gt=0, description="likewise, of the generator")
    attention_weight: float = Field(250.0, ge=0, description="weight of the attention losses; 0 without groups")
    clip_norm: float = Field(5.0, gt=0, description="largest norm of a gradient, of student and generator")
    sr_weight: SRWeight = 0.1
    sr_epochs: SREpochs = 3


class OoDParams(DataFreeParams, RecipeParams):
    """Distillation on patches of one picture. The defaults are ABD's for CIFAR-10."""

    method: Literal["ood"] = Field(description=METHOD)
    optimizer: Literal["auto", "sgd", "adam"] = Field(
        "adam", description=RecipeParams.model_fields["optimizer"].description)
    learning_rate: float = Field(1e-3, gt=0, description=Params.model_fields["learning_rate"].description)
    schedule: list[Annotated[int, Field(ge=0)]] = Field(
        [150, 300, 600], description=RecipeParams.model_fields["schedule"].description)
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


class SynthesisParams(DataFreeParams):
    """What the methods read that make images in rounds. The defaults are those of ABD's program for CIFAR-10."""

    learning_rate: float = Field(0.1, gt=0, description="of the student, falling to 0 along half a cosine")
    num_epochs: int = Field(200, ge=1, description="times `epoch_steps`")
    temperature: float = Field(20.0, gt=0, description="temperature T of the softened outputs")
    epoch_steps: int = Field(400, ge=1, description="steps of the student in an epoch, a multiple of `student_steps`")
    student_steps: StudentSteps = None
    synthesis_steps: SynthesisSteps
    synthesis_batch_size: int = Field(256, ge=2, description="images that are made at once")
    synthesis_learning_rate: SynthesisRate = 1e-3
    one_hot_weight: float = Field(1.0, ge=0, description="weight of the teacher's cross-entropy")
    batch_norm_weight: BatchNormWeight = 0.0
    adversarial_weight: AdversarialWeight = 0.0


class InversionParams(SynthesisParams):
    """What the methods read that keep what they make, and show the student augmented images of it."""

    augmentation: Augmentation = True


class CMIParams(InversionParams):
    """Contrastive model inversion."""

    method: Literal["cmi"] = Field(description=METHOD)
    synthesis_steps: SynthesisSteps = 200
    batch_norm_weight: BatchNormWeight = 1.0
    adversarial_weight: AdversarialWeight = 0.5
    latent_size: LatentSize = 256
    contrast_weight: float = Field(0.8, ge=0, description="weight of the contrastive loss")
    contrast_temperature: float = Field(0.1, gt=0, description="divides the similarities of views")
    negatives: int = Field(4096, ge=0, description="earlier images that a batch is contrasted with")
    bank_size: int = Field(40_960, ge=1, description="earlier images that are remembered for that")
    head_learning_rate: float = Field(1e-3, gt=0, description="of the network that compares views")


class DeepInversionParams(InversionParams):
    """DeepInversion."""

    method: Literal["deepinversion"] = Field(description=METHOD)
    synthesis_steps: SynthesisSteps = 1000
    synthesis_learning_rate: SynthesisRate = 0.1
    batch_norm_weight: BatchNormWeight = 10.0
    adversarial_weight: AdversarialWeight = 1.0
    variation_weight: float = Field(1e-3, ge=0, description="weight of the total variation")


class GenerativeParams(SynthesisParams):
    """What the methods read whose generator learns along with the student."""

    student_steps: StudentSteps = 5
    synthesis_steps: SynthesisSteps = 1
    latent_size: LatentSize = 256
    activation_weight: ActivationWeight = 0.0
    balance_weight: float = Field(20.0, ge=0, description="weight of the balance of the predicted classes")


class DAFLParams(GenerativeParams):
    """Data-free learning."""

    method: Literal["dafl"] = Field(description=METHOD)
    activation_weight: ActivationWeight = 1e-3


class DFQParams(GenerativeParams):
    """The distillation of data-free quantisation."""

    method: Literal["dfq"] = Field(description=METHOD)
    student_steps: StudentSteps = 10
    batch_norm_weight: BatchNormWeight = 1.0
    adversarial_weight: AdversarialWeight = 1.0


METHODS: dict[str, type[DataFreeParams]] = {
    "zskt": ZSKTParams, "ood": OoDParams, "cmi": CMIParams, "dafl": DAFLParams, "dfq": DFQParams,
    "deepinversion": DeepInversionParams}
