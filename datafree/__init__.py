"""Distillation without data: the methods, what they make images with, and the defenses against a poisoned teacher.

To add a method, write a file here with a `@REGISTRY.register` line; its contract is `datafree.distiller.Distiller`.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from utils.registry import Registry

if TYPE_CHECKING:
    from datafree.distiller import Distiller

REGISTRY: Registry[type[Distiller]] = Registry("method", package="datafree")
