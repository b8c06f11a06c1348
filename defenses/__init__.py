"""Defenses against model stealing: trained-in defenses, one file each, and answer defenses (`answers.py`,
`perturbations.py`).

The contract of a trained-in defense is `defenses.base.Defense`. To add one, write a file here with a
`@REGISTRY.register` line. Its parameters, `--help`, the JSON schema, the rows of docs/parameters.md and of reports
follow from the registry.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.registry import Registry

if TYPE_CHECKING:
    from defenses.base import Defense

    DEFENSE_NAMES: tuple[str, ...]

REGISTRY: Registry[type[Defense]] = Registry("defense", package="defenses")


def __getattr__(name: str) -> Any:
    if name == "DEFENSE_NAMES":  # computed on access: the files of the defenses import torch
        return tuple(REGISTRY)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
