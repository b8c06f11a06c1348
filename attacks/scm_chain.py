"""A chain of students, each the teacher of the next: the born-again part of SCM (Jandial et al., ECCV 2022).

    loss = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

Each link has the loss of `kd` and is a run of its own: the first student learns from the attacked teacher, and
`teacher_resume` of each further run is the checkpoint of the previous student. A public reimplementation
(edaylmz/distilling) has three students and then a fourth, all ResNet-18, with T 4 and `alpha` 0.9, the defaults here:

    python train_kd.py --save_path experiments/chain/link1 --teacher_resume experiments/nasty/last_model.tar
    python train_kd.py --save_path experiments/chain/link2 --teacher_resume experiments/chain/link1/last_model.tar
    ...

Set `attack` to "kd" for the links and to "scm_chain" for the last run, so that tables list it separately. Set
`teacher_model` to the network of the previous student.

This chain is ours: it lacks the contrastive term of the paper, whose code is not public. Do not compare numbers with
the paper's.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attacks import REGISTRY
from attacks.kd import KD


@REGISTRY.register("scm_chain", display_name="SCM chain",
                   source="ours: born-again chain after Jandial et al., ECCV 2022, without its contrastive term")
class SCMChain(KD):
    """Trains the last of a chain of students as `kd`. The first student learns from the answers, each other one from
    the previous student."""

    class Params(KD.Params):
        published: ClassVar[dict[str, dict[str, float]]] = {}
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")

    params: Params
