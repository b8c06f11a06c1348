"""Backdoor metrics of a network: attack success rate and its reference points, from exact counts."""
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
    """Metric on the test images of other classes than the target, with the trigger stamped on them.

    The attack success rate alone can mislead: a network that takes half of the clean images for the target has 50 %
    without a backdoor, and a network that has forgotten the target has 0 % without a defense. So `base_rate` and
    `target_recall` are reported with it.

    Rates without test images are undefined and left out; `left_out` explains which and why.
    """

    def __init__(self, test: Images, trigger: Trigger, target: int, dtype: torch.dtype) -> None:
        """test: all test images. target: target class of the trigger. dtype: dtype of the network's arithmetic."""
        others = test.labels != target
        self.triggered = Images(trigger.stamp(test.images[others]), test.labels[others], test.mean, test.std)
        self.target, self.dtype = target, dtype
        self.left_out: list[str] = []  # log lines, one for each kind of missing images
        if others.all():
            self.left_out.append(f"no test image has the target class {target}: target_recall is left out")
        if not others.any():
            self.left_out.append(f"all test images have the target class {target}, so none gets the trigger: asr, "
                                 "triggered_accuracy and base_rate are left out")

    def __call__(self, network: nn.Module, clean: Tensor) -> Row:
        """Metrics in percent:

            asr                 triggered images classified as the target (attack success rate)
            triggered_accuracy  triggered images classified correctly
            base_rate           clean images of other classes classified as the target
            target_recall       clean images of the target class classified correctly

        clean: confusion matrix (C, C) of the network on all test images.
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
        """Attack success rate of the images of each class, in percent; None for a class without images. Needs triggered
        images."""
        triggered, _ = confusion_matrix(network, self.triggered, self.dtype)
        return [100 * (row[self.target] / row.sum()).item() if row.sum() else None for row in triggered]


@dataclass(frozen=True)
class Measurements:
    """Backdoor measurements of a run, as arguments of `Run.train`; all empty without a trigger."""

    test: BackdoorTest | None = None

    @property
    def triggered(self) -> Images | None:
        """Test images with the trigger, possibly none; None without a trigger."""
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
    """Build the backdoor measurements of a run from its parameters `trigger` and `target`. Raises UserError for an
    unknown trigger or class."""
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
    carrier = role.startswith(("teacher", "adversarial"))  # not the clean classifier of `cl`
    return "the trigger fails on most images: the network lacks this backdoor" * (carrier and row.get("asr", 100) < 50)
