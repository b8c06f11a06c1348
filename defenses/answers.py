"""What a model's interface lets out: answer defenses, then the interface, as pure functions of probabilities.

    protect = build_answer_defense("none")
    release = build_interface("probabilities")
    answers = release(protect(logits.softmax(1)))     # (B, C) on the simplex

Each is called by its name and, where it has a strength, `NAME:STRENGTH`. An answer defense perturbs probabilities
without a change to the network; the interface decides how much of them a client sees. Both are deterministic, do not
modify their argument, and apply to every answer alike, so cached logits of a frozen network serve all of them.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from utils.losses import at_least_float32
from utils.registry import Registry

Transform = Callable[[Tensor], Tensor]  # probabilities (B, C) to probabilities (B, C)
Factory = Callable[[str], Transform]  # of the text after the colon, "" without one; ValueError for a bad one

ANSWER_DEFENSES: Registry[Factory] = Registry("answer defense")
INTERFACES: Registry[Factory] = Registry("interface")


def build_answer_defense(specification: str) -> Transform:
    """The answer defense `NAME` or `NAME:STRENGTH`. ValueError for an unknown name or a strength out of range."""
    return _build(ANSWER_DEFENSES, specification)


def build_interface(specification: str) -> Transform:
    """The interface `NAME` or `NAME:STRENGTH`. ValueError for an unknown name or a strength out of range."""
    return _build(INTERFACES, specification)


@dataclass(frozen=True)
class Answers:
    """What a client gets for logits (B, C): an answer defense, then an interface."""

    interface: str = "logits"
    answer_defense: str = "none"

    @property
    def changes_logits(self) -> bool:
        """Whether answers are anything but the network's logits."""
        return (self.interface, self.answer_defense) != ("logits", "none")

    def __call__(self, logits: Tensor) -> Tensor:
        """Answers to logits (B, C), as log-probabilities; -inf where a client gets exactly 0."""
        with torch.no_grad():
            probabilities = build_answer_defense(self.answer_defense)(at_least_float32(logits).softmax(1))
            return build_interface(self.interface)(probabilities).log()

    def __str__(self) -> str:
        return self.interface + f" after {self.answer_defense}" * (self.answer_defense != "none")


class _Protected(Protocol):
    interface: str
    answer_defense: str


def answers_of(params: _Protected) -> Answers | None:
    """The answers that parameters ask for; None where they are the logits. Raises UserError for an unknown name."""
    for key, build in (("answer_defense", build_answer_defense), ("interface", build_interface)):
        try:
            build(getattr(params, key))
        except ValueError as error:
            raise UserError(f'"{key}": {error}') from None
    answers = Answers(params.interface, params.answer_defense)
    return answers if answers.changes_logits else None


def _build(registry: Registry[Factory], specification: str) -> Transform:
    name, _, strength = specification.partition(":")
    try:
        return registry.entry(name).value(strength)
    except ValueError as error:
        if name in registry:
            raise ValueError(f"{registry.kind} '{specification}': {error}") from None
        raise


def _identity(strength: str) -> Transform:
    if strength:
        raise ValueError("takes no strength")
    return lambda probabilities: probabilities


ANSWER_DEFENSES.register("none", display_name="no answer defense")(_identity)
INTERFACES.register("logits")(_identity)
INTERFACES.register("probabilities")(_identity)
