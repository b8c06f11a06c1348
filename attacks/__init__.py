"""Attacks: how a thief trains a student on the answers of a teacher. One file per attack.

    attack = build_attack("kd", num_classes=10, temperature=1.0)
    loss = attack(student, batch, answers)["loss"]

The contract is `attacks.base.Attack`. To add an attack, write a file here with a `@REGISTRY.register` line: its
parameters, `--help`, the JSON schema, the rows of docs/parameters.md and the columns of reports follow from the
registry.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.registry import Registry

if TYPE_CHECKING:
    from attacks.base import Attack

    ATTACK_NAMES: tuple[str, ...]

REGISTRY: Registry[type[Attack]] = Registry("attack", package="attacks")


def build_attack(name: str, num_classes: int, **parameters: Any) -> Attack:
    """Build an attack with these parameters; defaults for those left out.

    Raises ValueError for an unknown name or parameter and for a value outside its range.
    """
    attack = REGISTRY.entry(name).value
    return attack(attack.Params(**parameters), num_classes)


def __getattr__(name: str) -> Any:
    if name == "ATTACK_NAMES":  # computed on access: the files of the attacks import torch
        return tuple(REGISTRY)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
