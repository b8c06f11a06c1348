"""Answers of a model's interface: an answer defense, then the interface, as pure functions of probabilities.

    protect = build_answer_defense("none")
    release = build_interface("probabilities")
    answers = release(protect(logits.softmax(1)))     # (B, C) on the simplex

Both are specified as `NAME` or `NAME:STRENGTH`. An answer defense perturbs probabilities and leaves the network as it
is. The interface decides how much of the probabilities a client sees. Both are deterministic, do not modify their
argument, and treat all answers alike, so cached logits of a frozen network serve all of them.
"""
from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from utils.errors import UserError
from utils.losses import at_least_float32
from utils.params import name_answers
from utils.registry import Registry

Transform = Callable[[Tensor], Tensor]  # probabilities (B, C) to probabilities (B, C)
Factory = Callable[[str], Transform]  # STRENGTH ("" if there is none) to a transform; ValueError for a bad one

ANSWER_DEFENSES: Registry[Factory] = Registry("answer defense", package="defenses")
INTERFACES: Registry[Factory] = Registry("interface")
_ORDERED: WeakSet[Transform] = WeakSet()  # see `ordered`


def build_answer_defense(specification: str) -> Transform:
    """Build the answer defense `NAME` or `NAME:STRENGTH`. Raises ValueError for an unknown name or a bad strength."""
    return _build(ANSWER_DEFENSES, specification)


def build_interface(specification: str) -> Transform:
    """Build the interface `NAME` or `NAME:STRENGTH`. Raises ValueError for an unknown name or a bad strength."""
    return _build(INTERFACES, specification)


class Answers:
    """Map logits (B, C) to the answers that a client gets, by an answer defense and then an interface."""

    def __init__(self, interface: str = "logits", answer_defense: str = "none") -> None:
        """Raises ValueError for an unknown name or a bad strength."""
        self.name = name_answers(interface, answer_defense)
        transforms = build_answer_defense(answer_defense), build_interface(interface)
        self._transforms = [transform for transform in transforms if transform is not _unchanged]
        self.ordered = any(transform in _ORDERED for transform in transforms)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return log-probabilities, float32 (B, C), for logits (B, C); -inf where a client gets exactly 0."""
        with torch.no_grad():
            log_p = at_least_float32(logits).log_softmax(1)
            if not self._transforms:
                return log_p
            probabilities = log_p.exp()
            for transform in self._transforms:
                probabilities = transform(probabilities)
            return probabilities.log()

    @property
    def changes(self) -> bool:
        """True if clients get other probabilities than those of the network."""
        return bool(self._transforms)

    def __str__(self) -> str:
        return self.name


class _Protected(Protocol):
    @property
    def interface(self) -> str: ...

    @property
    def answer_defense(self) -> str: ...


def build_answers(params: _Protected, *, in_order: bool = False) -> Answers | None:
    """Answers by `answer_defense` and `interface` of the parameters; None if these are the logits.

    in_order: all answers come from one call. Raises UserError for an unknown name or a bad strength, and for a defense
    that depends on the order of the queries if `in_order` is False.
    """
    for key, build in (("answer_defense", build_answer_defense), ("interface", build_interface)):
        try:
            build(getattr(params, key))
        except ValueError as error:
            raise UserError(f'"{key}": {error}') from None
    answers = Answers(params.interface, params.answer_defense)
    if answers.ordered and not in_order:
        raise UserError(f'"answer_defense" {params.answer_defense} depends on the order of the queries: use '
                        'train_kd.py with "queries" "once" and one view of each image')
    return answers if answers.name else None


def overview() -> str:
    """List of the interfaces and answer defenses and their descriptions, for --help."""
    lines = []
    for key, registry in (("interface", INTERFACES), ("answer_defense", ANSWER_DEFENSES)):
        lines.append(f"--set {key}=NAME or NAME:STRENGTH:")
        for name in registry:
            words = " ".join((registry[name].__doc__ or "").split("\n\n")[0].split())
            lines += textwrap.wrap(f"{name}: {words}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def ordered(transform: Transform) -> Transform:
    """Mark a transform whose result for a row depends on earlier rows."""
    _ORDERED.add(transform)
    return transform


def _build(registry: Registry[Factory], specification: str) -> Transform:
    name, _, strength = specification.partition(":")
    try:
        return registry.entry(name).value(strength)
    except ValueError as error:
        if name in registry:
            raise ValueError(f"{registry.kind} '{specification}': {error}") from None
        raise


def _identity(strength: str) -> Transform:
    """All probabilities, unchanged."""
    if strength:
        raise ValueError("takes no strength")
    return _unchanged


def _unchanged(probabilities: Tensor) -> Tensor:
    return probabilities


ANSWER_DEFENSES.register("none", display_name="no answer defense")(_identity)
INTERFACES.register("logits")(_identity)
INTERFACES.register("probabilities")(_identity)


@INTERFACES.register("top_k", display_name="top-k")
def _top_k(strength: str) -> Transform:
    """The K largest probabilities, renormalized; the others are 0."""
    return keep_largest(parse_integer(strength, "K", 1))


def keep_largest(k: int) -> Transform:
    """The k largest probabilities, renormalized; in a tie, the lowest indices."""
    def largest(probabilities: Tensor) -> Tensor:
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(probabilities).scatter(1, order[:, :k], 1.0) * probabilities
        return kept / kept.sum(1, keepdim=True)

    return largest


@INTERFACES.register("round", display_name="rounded")
def _round(strength: str) -> Transform:
    """Probabilities rounded to D decimals, renormalized; one-hot if all are rounded to 0."""
    decimals = parse_integer(strength, "D", 0, maximum=8)  # float32 has no more

    def rounded(probabilities: Tensor) -> Tensor:
        values = probabilities.round(decimals=decimals)
        values = torch.where(values.sum(1, keepdim=True) > 0, values, one_hot_top(probabilities))
        return values / values.sum(1, keepdim=True)

    return rounded


@INTERFACES.register("label", display_name="label")
def _label(strength: str) -> Transform:
    """The top class, as a one-hot answer."""
    if strength:
        raise ValueError("takes no strength")
    return one_hot_top


def one_hot_top(probabilities: Tensor) -> Tensor:
    """One-hot rows (B, C) of the top class; in a tie, the lowest index."""
    top = probabilities.argmax(1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(1, top, 1.0)


def parse_integer(strength: str, name: str, minimum: int, maximum: float = math.inf) -> int:
    """Parse a strength as an integer. Raises ValueError if it is none or out of range."""
    if not (strength.isascii() and strength.isdecimal() and minimum <= int(strength) <= maximum):
        limit = f" and at most {maximum}" if maximum < math.inf else ""
        raise ValueError(f"takes a whole number {name} of at least {minimum}{limit}, as in NAME:{minimum + 1}")
    return int(strength)
