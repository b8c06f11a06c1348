"""Stage scripts, and the parameters of their runs: those of the stage and those of the selected method."""
from __future__ import annotations

import json
import textwrap
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import Field, create_model

from utils.errors import UserError
from utils.params.base import MethodParams, Params
from utils.registry import Registry


class Stage:
    """Stage script: its name, the parameters of all its runs, and the registered methods to select from.

    A run has the parameters of the stage and those of the method (`Params` of the registered class); a method may also
    subclass the stage's parameters to change defaults.
    """

    ALL: ClassVar[dict[str, Stage]] = {}  # all stages by name

    def __init__(self, name: str, params: type[Params], *, key: str = "",
                 methods: Registry[Any] | None = None) -> None:
        """key: parameter that selects the method."""
        self.name, self.params = name, params
        self.script = params.script
        self.key = key
        self._registry: Registry[Any] = methods if methods is not None else Registry("method")
        self._params_by: dict[str, type[Params]] = {}
        Stage.ALL[name] = self

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the registered methods; empty for a stage without a choice."""
        return tuple(self._registry)

    def params_of(self, values: dict[str, Any]) -> type[Params]:
        """Parameter class for a params.json with these values. Raises UserError if its method is missing or unknown."""
        if not self.key:
            return self.params
        field = self.params.model_fields[self.key]
        method = values.get(self.key, None if field.is_required() else field.default)
        if method is None:
            raise UserError(f'the key "{self.key}" is missing: choose from {", ".join(self.methods)}')
        if not isinstance(method, str) or method not in self.methods:
            near = get_close_matches(str(method).lower(), self.methods, n=1)
            hint = f' (did you mean "{near[0]}"?)' if near and isinstance(method, str) else ""
            raise UserError(f'"{self.key}" is {json.dumps(method)}{hint}: choose from {", ".join(self.methods)}')
        return self.params_by(method)

    def params_by(self, method: str) -> type[Params]:
        """Parameter class of one method."""
        if method not in self._params_by:
            self._params_by[method] = self._compose(method)
        return self._params_by[method]

    def all_params(self) -> dict[str, type[Params]]:
        """Parameter classes by method or, for a stage without a choice, by the name of the stage."""
        return {method: self.params_by(method) for method in self.methods} or {self.name: self.params}

    def help(self) -> str:
        """Text for --help: the methods with sources and parameters; empty for a stage without a choice."""
        lines = []
        for method in self.methods:
            entry = self._registry.entry(method)
            own = ", ".join(name if field.is_required() else f"{name}={json.dumps(field.default)}"
                            for name, field in entry.value.Params.model_fields.items()
                            if name not in self.params.model_fields)
            lines += textwrap.wrap(f"{method}: {entry.source}. {own}", 100, initial_indent="  ",
                                   subsequent_indent="    ")
        title = f"--set {self.key}=NAME selects one of these, listed with source and parameters:\n"
        return title + "\n".join(lines) + "\n\n" if lines else ""

    def display_name(self, method: str) -> str:
        """Display name of a method in tables; the name itself if it is not registered."""
        return self._registry.entry(method).display_name if method in self.methods else method

    def _compose(self, method: str) -> type[Params]:
        entry = self._registry.entry(method)
        own: type[MethodParams] = entry.value.Params
        bases: tuple[type[Any], ...] = (own,)
        if not issubclass(own, self.params):
            bases = own, self.params
            if shared := [name for name in own.model_fields if name in self.params.model_fields]:
                raise ValueError(f"{own.__module__}.{own.__qualname__} of '{method}' redefines {', '.join(shared)} of "
                                 f"{self.params.__name__}: rename, or subclass {self.params.__name__}")
        field = self.params.model_fields[self.key]
        choice = Field(... if field.is_required() else field.default, description=field.description,
                       json_schema_extra={"enum": list(self.methods)})
        fields: dict[str, Any] = {self.key: (str, choice)}
        return create_model(f"{self.params.__name__}[{method}]", __base__=bases, __doc__=entry.value.__doc__, **fields)

