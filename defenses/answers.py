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
from typing import Protocol

import torch
from torch import Tensor

from utils.errors import UserError
from utils.losses import at_least_float32
from utils.params import name_answers
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


class Answers:
    """What a client gets for logits (B, C): an answer defense, then an interface."""

    def __init__(self, interface: str = "logits", answer_defense: str = "none") -> None:
        """Raises ValueError for an unknown name, or a strength out of range."""
        self.name = name_answers(interface, answer_defense)
        transforms = build_answer_defense(answer_defense), build_interface(interface)
        self._transforms = [transform for transform in transforms if transform is not _unchanged]

    def __call__(self, logits: Tensor) -> Tensor:
        """Answers to logits (B, C), float32, as log-probabilities; -inf where a client gets exactly 0."""
        with torch.no_grad():
            log_p = at_least_float32(logits).log_softmax(1)
            if not self._transforms:
                return log_p
            probabilities = log_p.exp()
            for transform in self._transforms:
                probabilities = transform(probabilities)
            return probabilities.log()

    def __str__(self) -> str:
        return self.name


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
    return answers if answers.name else None


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
    return _unchanged


def _unchanged(probabilities: Tensor) -> Tensor:
    return probabilities


ANSWER_DEFENSES.register("none", display_name="no answer defense")(_identity)
INTERFACES.register("logits")(_identity)
INTERFACES.register("probabilities")(_identity)
