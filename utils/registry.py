"""Registries of methods by name. Each method registers itself in its own file.

    REGISTRY: Registry[type[Attack]] = Registry("attack", package="attacks")

    @REGISTRY.register("kd", display_name="KD", source="Hinton et al., 2015, arXiv:1503.02531")
    class KD(Attack): ...

A registry with a package imports every module of it on the first look-up, so a new file is enough to add a method.
"""
from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """Registered method: `display_name` is the name in tables, `source` the publication."""

    name: str
    value: T
    display_name: str
    source: str


class Registry(Mapping[str, T]):
    """Methods by name, sorted. `kind`: the word for one of them in messages, such as `attack`."""

    def __init__(self, kind: str, package: str = "") -> None:
        """package: every module of it is imported before the first look-up."""
        self.kind = kind
        self._package, self._loading = package, False
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, display_name: str = "", source: str = "") -> Callable[[T], T]:
        """Decorator that registers a class or function as `name`. Raises ValueError if the name is taken."""
        def decorate(value: T) -> T:
            if name in self._entries:
                raise ValueError(f"two {self.kind}s are registered as {name!r}")
            self._entries[name] = Entry(name, value, display_name or name, source)
            return value
        return decorate

    def entry(self, name: str) -> Entry[T]:
        """Entry of `name`. Raises ValueError, with the nearest name, if it is unknown."""
        entries = self._loaded()
        if name not in entries:
            near = get_close_matches(name.lower(), entries, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise ValueError(f"unknown {self.kind} '{name}'{hint}: choose from {', '.join(self)}")
        return entries[name]

    def __getitem__(self, name: str) -> T:
        """Class or function registered as `name`. Raises KeyError; `entry` raises a readable error."""
        return self._loaded()[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Entry[T]]:
        if self._package and not self._loading:
            self._loading = True  # modules of the package may look up entries during their import
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                    importlib.import_module(module.name)
                self._package = ""  # only now: after an error the next look-up imports the module again
            finally:
                self._loading = False
                for name in [name for name, entry in self._entries.items()
                             if getattr(entry.value, "__module__", "") not in sys.modules]:
                    del self._entries[name]  # the file failed after registering and will register again
        return self._entries
