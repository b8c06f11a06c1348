"""Distillation without data: methods, their image generators, and defenses against a poisoned teacher.

The contract of a method is `datafree.distiller.Distiller`. To add one, write a file here with a `@REGISTRY.register`
line.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from utils.registry import Registry

if TYPE_CHECKING:
    from datafree.distiller import Distiller

REGISTRY: Registry[type[Distiller]] = Registry("method", package="datafree")
