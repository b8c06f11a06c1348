"""Registry of the zoo: networks by name, registered in the file of each family."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

Build = Callable[..., nn.Module]  # (num_classes, **options) -> network


class Entry(NamedTuple):
    build: Build
    optimizer: str  # "sgd" or "adam", by the published recipe of the network


REGISTRY: dict[str, Entry] = {}


def register(name: str, *, optimizer: str = "sgd") -> Callable[[Any], Any]:
    """Decorator that registers a class or function `(num_classes, **options) -> network`. Raises ValueError for a name
    that is taken."""
    def decorate(build: Any) -> Any:
        if name in REGISTRY:
            raise ValueError(f"two models are registered as {name!r}")
        REGISTRY[name] = Entry(build, optimizer)
        return build

    return decorate
