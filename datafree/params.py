"""Parameters shared by several data-free methods."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from backdoor.params import BackdoorParams
from utils.params import Augmentation, Description, Params, Switch, TeacherParams, name_answers

# Keys whose default depends on the method.
SREpochs = Annotated[int, Field(ge=1, description="last epochs, in which self-retrospection is on")]
SRWeight = Annotated[float, Field(ge=0, description="weight of the hypergradient beside the gradient of distillation")]
LatentSize = Annotated[int, Field(ge=1, description="numbers that the generator makes an image of")]
StudentSteps = Annotated[int | None, Field(ge=1, description="steps of the student in a round; null: `epoch_steps`")]
SynthesisSteps = Annotated[int, Field(ge=1, description="steps that make images, in a round")]
SynthesisRate = Annotated[float, Field(gt=0, description="learning rate of what makes them: generator, or pixels")]
BatchNormWeight = Annotated[float, Field(ge=0, description="weight of the loss of batch-norm statistics")]
AdversarialWeight = Annotated[float, Field(ge=0, description="weight of the disagreement of student and teacher")]
ActivationWeight = Annotated[float, Field(ge=0, description="weight of the activation before the classifier")]


class DataFreeParams(BackdoorParams, TeacherParams, Params):
    """train_datafree.py: a student that learns from a teacher without a data set. Parameters of all methods."""

    script = "train_datafree.py"
    artifacts: ClassVar[tuple[str, ...]] = ("synthetic.png", "perturbation.png")
    renamed: ClassVar[Mapping[str, str]] = {"defense": "backdoor_defense"}
    method: str = Field(description="how the student learns without data")

    @property
    def changeable(self) -> tuple[str, ...]:
        """num_epochs is not changeable: learning rates and the defenses depend on the last epoch."""
        return tuple(key for key in super().changeable if key != "num_epochs")

    @property
    def description(self) -> Description:
        return Description("student", method=self.method, plain=False, uses_data=False,
                           answers=name_answers(self.interface, self.answer_defense),
                           backdoor_defense=self.backdoor_defense)

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if self.backdoor_defense in ("none", "sr"):
            yield "sv_*", '"backdoor_defense" has no vaccine'
        if self.backdoor_defense in ("none", "sv"):
            yield "sr_*", '"backdoor_defense" has no self-retrospection'

    backdoor_defense: Literal["none", "sv", "sr", "sv+sr", "auto"] = Field(
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


class SynthesisParams(DataFreeParams):
    """Parameters of methods that make images in rounds. The defaults are those of ABD's code for CIFAR-10."""

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
    """Parameters of methods that keep synthetic images and augment them for the student."""

    augmentation: Augmentation = True


class GenerativeParams(SynthesisParams):
    """Parameters of methods that train a generator along with the student."""

    student_steps: StudentSteps = 5
    synthesis_steps: SynthesisSteps = 1
    latent_size: LatentSize = 256
    activation_weight: ActivationWeight = 0.0
    balance_weight: float = Field(20.0, ge=0, description="weight of the balance of the predicted classes")
