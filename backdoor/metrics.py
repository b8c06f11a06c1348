"""What a backdoor does to a network, in exact counts."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backdoor.triggers import Trigger, build_trigger
from utils.data import Images
from utils.errors import UserError
from utils.evaluation import Metric, accuracy, confusion_matrix
from utils.results import Row
from utils.run import Run, Warn


class BackdoorTest:
    """The test images that are not of the target class, with the trigger on them.

    An attack success rate says little alone: a network that takes every other clean image for the target reaches 50 %
    without any backdoor, and one that has forgotten the target reaches 0 % without any defence. So the rates of both
    stand beside it.

    A rate of images that the test part lacks is undefined and left out: `left_out` says which.
    """

    def __init__(self, test: Images, trigger: Trigger, target: int, dtype: torch.dtype) -> None:
        """test: all test images. target: the class that the trigger leads to."""
        others = test.labels != target
        self.triggered = Images(trigger.stamp(test.images[others]), test.labels[others], test.mean, test.std)
        self.target, self.dtype = target, dtype
        self.left_out: list[str] = []  # a line for each kind of images that there are none of
        if others.all():
            self.left_out.append(f"no test image is of the target class {target}: target_recall is left out")
        if not others.any():
            self.left_out.append(f"no test image is of another class than the target {target}, so none carries the "
                                 "trigger: asr, triggered_accuracy and base_rate are left out")

    def __call__(self, network: nn.Module, clean: Tensor) -> Row:
        """In percent:

            asr                 triggered images that are taken for the target (the attack success rate)
            triggered_accuracy  triggered images that are still given their true label
            base_rate           clean images of other classes that are taken for the target
            target_recall       clean images of the target that are recognised

        clean: the confusion matrix (C, C) of the network on all test images.
        """
        row, recognized, of_target = {}, clean[self.target, self.target], clean[self.target].sum()
        if len(self.triggered):
            triggered, _ = confusion_matrix(network, self.triggered, self.dtype)
            row = {
                "asr": 100 * (triggered[:, self.target].sum() / triggered.sum()).item(),
                "triggered_accuracy": accuracy(triggered),
                "base_rate": 100 * ((clean[:, self.target].sum() - recognized) / (clean.sum() - of_target)).item(),
            }
        if of_target:
            row["target_recall"] = 100 * (recognized / of_target).item()
        return row

    def by_class(self, network: nn.Module) -> list[float | None]:
        """The attack success rate of the images of each class, in percent; None where there are none. Needs triggered
        images."""
        triggered, _ = confusion_matrix(network, self.triggered, self.dtype)
        return [100 * (row[self.target] / row.sum()).item() if row.sum() else None for row in triggered]


@dataclass(frozen=True)
class Measurements:
    """What a run measures of a backdoor, as arguments of `Run.train`; all empty without a trigger."""

    test: BackdoorTest | None = None

    @property
    def triggered(self) -> Images | None:
        """The test images that carry the trigger, which may be none of them."""
        return self.test.triggered if self.test else None

    @property
    def metrics(self) -> list[Metric]:
        return [self.test] if self.test else []

    @property
    def warnings(self) -> list[Warn]:
        return [_warn_about_carrier] if self.test else []

    @property
    def final(self) -> dict[str, Callable[[nn.Module], Any]]:
        return {"asr_by_class": self.test.by_class} if self.test and len(self.test.triggered) else {}


def measure_backdoor(run: Run) -> Measurements:
    """What to measure of the backdoor that a run's parameters name, if they name one. Raises UserError if there is no
    such trigger, or no such class."""
    params = run.params
    if not params.trigger:
        return Measurements()
    if params.target >= run.dataset.num_classes:
        raise UserError(f'"target" is {params.target}: the data set has {run.dataset.num_classes} classes, from 0 on')
    trigger = build_trigger(params.trigger, params.dataset)
    test = BackdoorTest(run.parts["test"], trigger, params.target, run.dtype)
    for text in test.left_out:
        run.log(text)
    return Measurements(test)


def _warn_about_carrier(role: str, row: Row) -> str:
    carrier = role.startswith(("teacher", "adversarial"))  # not a clean classifier that `cl` takes
    return "the trigger fails on most images: no carrier of this backdoor" * (carrier and row.get("asr", 100) < 50)
