"""Settings that do nothing beside the others: no error, but whoever set them should know."""
from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from utils.params.base import Params

# Keys (`*`: and all that begin so); when they do nothing, given all values; why. Only a stage's own keys are looked at.
_RULES: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], bool], str]] = [
    (("num_channels", "dropout_rate"), lambda values: values["model_name"] != "net", '"model_name" is not "net"'),
    (("teacher_num_channels",), lambda values: values["teacher_model"] != "net", '"teacher_model" is not "net"'),
    (("adversarial_num_channels",), lambda values: values["adversarial_model"] != "net",
     '"adversarial_model" is not "net"'),
    (("surrogate_num_channels",), lambda values: (values["surrogate_model"] or values["model_name"]) != "net",
     'the clean classifier is not a "net"'),
    (("schedule", "gamma"), lambda values: values["annealing"] == "cosine", '"annealing" is "cosine"'),
    (("gamma",), lambda values: values["annealing"] == "steps" and not values["schedule"], '"schedule" is empty'),
    (("target",), lambda values: not values["trigger"], 'there is no "trigger"'),
    (("surrogate_model", "surrogate_num_channels"), lambda values: not values["surrogate_resume"],
     'there is no "surrogate_resume"'),
    (("sv_*",), lambda values: values["defense"] in ("none", "sr"), '"defense" is without the vaccine'),
    (("sr_*",), lambda values: values["defense"] in ("none", "sv"), '"defense" is without self-retrospection'),
]


def without_effect(params: Params) -> list[str]:
    """A text for each parameter that was set to another value than its default and that nothing reads.

    What published files carry along is not named: defaults, and epochs of `schedule` that are never reached.
    """
    values, fields = params.model_dump(), type(params).model_fields
    given = [key for key in fields if key in params.model_fields_set and values[key] != fields[key].default]
    return [f'"{key}" {json.dumps(values[key])} has no effect: {reason}'
            for patterns, idle, reason in _RULES for key in given
            if any(fnmatchcase(key, pattern) for pattern in patterns) and idle(values)]
