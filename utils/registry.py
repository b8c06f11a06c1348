"""Registries: the methods of one kind by name, each registered in its own file.

    REGISTRY: Registry[type[Attack]] = Registry("attack", package="attacks")

    @REGISTRY.register("kd", display_name="KD", source="Hinton et al., 2015, arXiv:1503.02531")
    class KD(Attack): ...

A registry with a package imports every module of it when it is first asked for a name, so that adding a method is
adding a file.
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
    """A registered method: `display_name` is how tables call it, `source` where it was published."""

    name: str
    value: T
    display_name: str
    source: str


class Registry(Mapping[str, T]):
    """Methods by name, sorted by name. `kind` is what messages call one of them: `attack`, `data set`."""

    def __init__(self, kind: str, package: str = "") -> None:
        """package: every module of it is imported before the first look-up."""
        self.kind = kind
        self._package, self._loading = package, False
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, display_name: str = "", source: str = "") -> Callable[[T], T]:
        """Decorator that registers a class or function as `name`. ValueError if the name is taken."""
        def decorate(value: T) -> T:
            if name in self._entries:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self._entries[name] = Entry(name, value, display_name or name, source)
            return value
        return decorate

    def entry(self, name: str) -> Entry[T]:
        """What is registered as `name`. ValueError, with the nearest names, if nothing is."""
        entries = self._loaded()
        if name not in entries:
            near = get_close_matches(name.lower(), entries, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise ValueError(f"unknown {self.kind} '{name}'{hint}: choose from {', '.join(self)}")
        return entries[name]

    def __getitem__(self, name: str) -> T:
        """The class or function registered as `name`; KeyError, as mappings have it, see `entry`."""
        return self._loaded()[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Entry[T]]:
        if self._package and not self._loading:
            self._loading = True  # modules of the package may look something up while they are imported
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                    importlib.import_module(module.name)
                self._package = ""  # only now: after an error the next look-up imports again what failed
            finally:
                self._loading = False
                for name in [name for name, entry in self._entries.items()
                             if getattr(entry.value, "__module__", "") not in sys.modules]:
                    del self._entries[name]  # of a file that failed after it registered: it will register again
        return self._entries
