"""Parameters shared by several data-free methods."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from backdoor.params import BackdoorParams
from utils.params import Augmentation, Description, Params, Switch, TeacherParams, name_answers

# Keys that several methods have with defaults of their own.
SREpochs = Annotated[int, Field(ge=1, description="number of final epochs that use self-retrospection")]
SRWeight = Annotated[float, Field(ge=0, description="weight of the hypergradient of self-retrospection")]
LatentSize = Annotated[int, Field(ge=1, description="dimension of the generator's latent vector")]
StudentSteps = Annotated[int | None, Field(ge=1, description="student steps per synthesis round; null: `epoch_steps`")]
SynthesisSteps = Annotated[int, Field(ge=1, description="steps on the images or the generator per synthesis round")]
SynthesisRate = Annotated[float, Field(gt=0, description="learning rate of the images or the generator")]
BatchNormWeight = Annotated[float, Field(ge=0, description="weight of the batch-norm statistics loss")]
AdversarialWeight = Annotated[float, Field(ge=0, description="weight of the adversarial teacher-student divergence")]
ActivationWeight = Annotated[float, Field(ge=0, description="weight of the activation loss (classifier input)")]


class DataFreeParams(BackdoorParams, TeacherParams, Params):
    """train_datafree.py: a student that learns from a teacher without a data set. Parameters of all methods."""

    script = "train_datafree.py"
    artifacts: ClassVar[tuple[str, ...]] = ("synthetic.png", "perturbation.png")
    renamed: ClassVar[Mapping[str, str]] = {"defense": "backdoor_defense"}
    method: str = Field(description="data-free distillation method")

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
        elif self.backdoor_defense != "auto" and not self.sv_batches:
            yield from (("sv_tail", '"sv_batches" is 0'), ("sv_fallback", '"sv_batches" is 0'))
        if self.backdoor_defense in ("none", "sv"):
            yield "sr_*", '"backdoor_defense" has no self-retrospection'

    backdoor_defense: Literal["none", "sv", "sr", "sv+sr", "auto"] = Field(
        "none", description="backdoor defense of ABD. `sv`: shuffling vaccine; `sr`: self-retrospection; `sv+sr`: "
                            "both; `auto`: `sv`, or `sr` if no good vaccine is found")
    sv_weight: float = Field(0.1, ge=0, description="weight of the shuffling vaccine in the loss")
    sv_layers: int | None = Field(
        None, ge=1,
        description="number of final convolutions that the vaccine shuffles; null: 5, or half of all if there "
                    "are fewer than 10")
    sv_members: int = Field(3, ge=1, description="number of shuffled copies of the teacher in the vaccine")
    sv_batches: int = Field(
        0, ge=0, description="batches that test a vaccine before use; up to 8 vaccines are tested. 0: no test (50 "
                             "batches if `backdoor_defense` is `auto`)")
    sv_tail: float = Field(
        0.02, ge=0, lt=1,
        description="a tested vaccine is accepted if for more than this fraction of the images, log k (k: its "
                    "divergence from the teacher) is three standard deviations below the mean")
    sv_fallback: Switch = Field(
        False, description="1: if no tested vaccine is accepted, use the one for which the most images pass the "
                           "criterion of `sv_tail`; 0: use none, as published. Needs `sv_batches` or `auto`")
    sr_epochs: SREpochs = 2
    sr_learning_rate: float = Field(
        5e-4, gt=0, description="initial learning rate of the student in self-retrospection; cosine to 0")
    sr_rounds: int = Field(10, ge=1, description="Adam steps on the perturbation per student step")
    sr_perturbation_rate: float = Field(
        0.1, gt=0, description="Adam learning rate of the perturbation, in units of normalized pixels")
    sr_start: float = Field(
        0.01, ge=0, description="standard deviation of the initial perturbation, in normalized pixels; published: 0")
    sr_source: Literal["teacher", "student"] = Field(
        "teacher", description="network whose outputs the perturbation changes most")
    sr_weight: SRWeight = 1.0
    sr_penalty: float = Field(1e-3, ge=0, description="weight of the penalty on the perturbation's squared L2 norm")
    sr_radius: float | None = Field(
        None, gt=0, description="maximum L2 norm of the perturbation, in normalized pixels; null: no limit")
    sr_batch_norm: Literal["frozen", "train"] = Field(
        "frozen", description="batch norm in self-retrospection. `frozen`: running statistics, not updated; `train`: "
                              "batch statistics in the student, which update its running ones")
    sr_portion: float = Field(
        0.02, gt=0, le=1,
        description="fraction of a batch that is perturbed in the unlearning loss of self-retrospection")
    sr_detach: Switch = Field(
        True, description="detach the clean outputs in the unlearning loss of self-retrospection")
    sr_steps: int = Field(5, ge=1, description="number of fixed-point iterations of the hypergradient")
    sr_eta: float = Field(0.1, gt=0, description="step size of the fixed-point iterations of the hypergradient")


class SynthesisParams(DataFreeParams):
    """Parameters of methods that make images in rounds. The defaults are those of ABD's code for CIFAR-10."""

    learning_rate: float = Field(0.1, gt=0, description="initial learning rate of the student; cosine to 0")
    num_epochs: int = Field(200, ge=1, description="number of epochs, each of `epoch_steps` student steps")
    temperature: float = Field(20.0, gt=0, description="temperature T of the softened outputs in the KL term")
    epoch_steps: int = Field(400, ge=1, description="student steps per epoch; a multiple of `student_steps`")
    student_steps: StudentSteps = None
    synthesis_steps: SynthesisSteps
    synthesis_batch_size: int = Field(256, ge=2, description="batch size of the synthesis")
    synthesis_learning_rate: SynthesisRate = 1e-3
    one_hot_weight: float = Field(
        1.0, ge=0, description="weight of the cross-entropy of the teacher with the class that the image is made "
                               "for or, for `dafl` and `dfq`, with its top class")
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
    balance_weight: float = Field(
        20.0, ge=0, description="weight of the information-entropy loss, which balances the predicted classes")
