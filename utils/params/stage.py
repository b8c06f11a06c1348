"""A stage script and the parameters of its runs: those of the stage, and those of the registered method it chooses."""
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
    """A `train_*.py`: its name, its script, the parameters shared by all its runs, and the methods among which a
    parameter chooses.

    The parameters of a run are those of the stage and those of the method, `Params` of what is registered; a method may
    also subclass the stage's parameters to change their defaults.
    """

    ALL: ClassVar[dict[str, Stage]] = {}  # every stage that was created, by name

    def __init__(self, name: str, params: type[Params], *, key: str = "",
                 methods: Registry[Any] | None = None) -> None:
        """key: the parameter that names the method."""
        self.name, self.params = name, params
        self.script = params.script
        self.key = key
        self._registry: Registry[Any] = methods if methods is not None else Registry("method")
        self._params_by: dict[str, type[Params]] = {}
        Stage.ALL[name] = self

    @property
    def methods(self) -> tuple[str, ...]:
        """The registered methods; for a stage without a choice, none."""
        return tuple(self._registry)

    def params_of(self, values: dict[str, Any]) -> type[Params]:
        """The parameters that a params.json with these values may have. UserError if its method is none."""
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
        """The parameters of runs by one method."""
        if method not in self._params_by:
            self._params_by[method] = self._compose(method)
        return self._params_by[method]

    def all_params(self) -> dict[str, type[Params]]:
        """The parameters by method; of a stage without a choice, under the stage's own name."""
        return {method: self.params_by(method) for method in self.methods} or {self.name: self.params}

    def help(self) -> str:
        """The methods with their sources and parameters, for --help; empty for a stage without a choice."""
        lines = []
        for method in self.methods:
            entry = self._registry.entry(method)
            own = ", ".join(name if field.is_required() else f"{name}={json.dumps(field.default)}"
                            for name, field in entry.value.Params.model_fields.items()
                            if name not in self.params.model_fields)
            lines += textwrap.wrap(f"{method}: {entry.source}. {own}", 100, initial_indent="  ",
                                   subsequent_indent="    ")
        return f'--set {self.key}=NAME, with the parameters of each:\n' + "\n".join(lines) + "\n\n" if lines else ""

    def display_name(self, method: str) -> str:
        """What tables call a method; the name itself where no such method is registered."""
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

