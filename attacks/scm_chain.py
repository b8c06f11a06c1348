"""A chain of students, each the teacher of the next: the born-again part of SCM (Jandial et al., ECCV 2022).

    loss = alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

The loss of each link is that of `kd`. The chain is a list of runs: the first student learns from the attacked teacher,
and `teacher_resume` of each further run is the checkpoint of the student before. Three students and then a fourth one,
all ResNet-18, are the form of a public reimplementation (edaylmz/distilling), whose T 4 and `alpha` 0.9 are the
defaults:

    python train_kd.py --save_path experiments/chain/link1 --teacher_resume experiments/nasty/last_model.tar
    python train_kd.py --save_path experiments/chain/link2 --teacher_resume experiments/chain/link1/last_model.tar
    ...

with `attack` "kd" for the links, "scm_chain" for the last run, so that tables list it apart, and `teacher_model` the
network of the student before.

Ours, stated as ours: the sequence of contrastive models of the paper, whose code is not public, has a contrastive term
that this chain lacks. Do not compare its numbers with the paper's.
"""
from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attacks import REGISTRY
from attacks.kd import KD


@REGISTRY.register("scm_chain", display_name="SCM chain",
                   source="ours: born-again chain after Jandial et al., ECCV 2022, without its contrastive term")
class SCMChain(KD):
    """Last student of a chain whose teacher is the student before, by the loss of `kd`."""

    class Params(KD.Params):
        published: ClassVar = {}
        temperature: float = Field(4.0, gt=0, description="temperature T of the softened outputs in the KL term")

    params: Params
