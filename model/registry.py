"""Registry of the zoo: networks by name, entered by a `@register` line in the file of each family."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

Build = Callable[..., nn.Module]  # of (num_classes, **options)


class Entry(NamedTuple):
    build: Build
    optimizer: str  # "sgd" or "adam": the published recipe of the network


REGISTRY: dict[str, Entry] = {}


def register(name: str, *, optimizer: str = "sgd") -> Callable[[Any], Any]:
    """Enter a class or function under a name; it is called with the number of classes, and options as keywords."""
    def decorate(build: Any) -> Any:
        if name in REGISTRY:
            raise ValueError(f"two models are registered as {name!r}")
        REGISTRY[name] = Entry(build, optimizer)
        return build

    return decorate
