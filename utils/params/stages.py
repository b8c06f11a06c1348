"""The keys of each stage, and the stages by name."""
from __future__ import annotations

from pydantic import Field

from utils.params.base import BackdoorParams, DataParams, Params, Switch, TeacherParams
from utils.params.datafree import METHODS


class ScratchParams(DataParams):
    """train_scratch.py: a network from labels alone."""

    script = "train_scratch.py"


class FrozenParams(DataParams):
    """What the stages with a frozen network read."""

    temperature: float = Field(gt=0, description="temperature T of the softened outputs in the KL term")
    teacher_cache: Switch = Field(
        False, description="keep the frozen network's logits of each view of an image, for all runs, in `data/cache`")


class NastyParams(BackdoorParams, FrozenParams):
    """train_nasty.py: a teacher that undermines its students."""

    script = "train_nasty.py"
    adversarial_model: str = Field(description="architecture of the frozen adversary, as a rule `model_name`")
    adversarial_num_channels: int = Field(32, ge=1, description="`num_channels` of an adversary that is a `net`")
    adversarial_resume: str = Field(description="checkpoint of the adversary: a normally trained teacher")
    weight: float = Field(ge=0, description="weight of the term that drives the nasty teacher from the adversary")


class KDParams(BackdoorParams, TeacherParams, FrozenParams):
    """train_kd.py: a student of a frozen teacher."""

    script = "train_kd.py"
    alpha: float = Field(ge=0, le=1, description="weight of the KL term; the cross-entropy has 1 - `alpha`")


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


STAGES: dict[str, type[Params]] = {"scratch": ScratchParams, "nasty": NastyParams, "kd": KDParams,
                                   "poisoned": PoisonedParams, **METHODS}
