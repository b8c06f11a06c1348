"""Parameters of runs that measure a backdoor."""
from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from utils.params import MethodParams


class BackdoorParams(MethodParams):
    """Trigger and target class of a backdoor."""

    trigger: str | None = Field(None, description="trigger of the backdoor whose attack success rate is measured")
    target: int = Field(0, ge=0, description="target class of the trigger")

    def ineffective_parameters(self) -> Iterator[tuple[str, str]]:
        yield from super().ineffective_parameters()
        if not self.trigger:
            yield "target", 'there is no "trigger"'
