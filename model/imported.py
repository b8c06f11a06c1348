"""Networks from elsewhere by name: `torchvision:NAME`, `timm:NAME`, `package.module:callable`.

The libraries are imported on first use. `package.module` is code of the user, which may lie in the current directory.
"""
from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from model.features import run_once

# A function that builds a network, and its fixed arguments. Weights are never downloaded; they come from checkpoints.
Source = tuple[Callable[..., nn.Module], dict[str, Any]]


def find(name: str) -> Source:
    """Function that builds the network SOURCE:NAME, and arguments that options may not replace.

    Raises a one-line ValueError for an unknown name.
    """
    source, _, what = name.partition(":")
    return SOURCES.get(source, functools.partial(_from_module, source))(what)


def imports_code(name: str) -> bool:
    """Whether a name is `package.module:callable`, code of the user."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in SOURCES


def imported_code(name: str) -> str | None:
    """Module and file that `package.module:callable` imports; None for other names.

    Raises a one-line ValueError if the import fails.
    """
    if not imports_code(name):
        return None
    module, _, _ = name.partition(":")
    return f"{module} ({getattr(_import(module), '__file__', None) or 'built in'})"


def check_logits(network: nn.Module, num_classes: int, image_size: int) -> None:
    """Raise a one-line ValueError unless a network maps images to logits (B, num_classes) in eval and training mode.

    Runs the network on black images, (2, 3, image_size, image_size); its state and random number generators are
    restored.
    """
    for training in (False, True):
        try:
            output = run_once(network, image_size, count=2, training=training)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"images of {image_size}x{image_size} pixels: {type(error).__name__}: {reason}") from error
        if not isinstance(output, Tensor) or output.shape != (2, num_classes):
            shape = f" of shape {tuple(output.shape[1:])}" if isinstance(output, Tensor) else ""
            raise ValueError(f"gives {type(output).__name__}{shape} for an image in {'training' * training or 'eval'} "
                             f"mode, not {num_classes} logits")


def near_match(name: str, names: Iterable[str]) -> str:
    """Hint for a message with similar names; empty if there are none."""
    near = get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _from_torchvision(name: str) -> Source:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}{near_match(name, known)}")
    # Without auxiliary heads, as networks must return only logits in training too.
    auxiliary = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model_builder(name), {"weights": None, **auxiliary}


def _from_timm(name: str) -> Source:
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm:{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{near_match(name, timm.list_models())}")
    return functools.partial(timm.create_model, name), {"pretrained": False, "checkpoint_path": ""}


def _from_module(module_name: str, attribute: str) -> Source:
    module = _import(module_name)
    try:
        build = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise ValueError(f"module {module_name} has no {attribute!r}{near_match(attribute, vars(module))}") from None
    if not callable(build):
        raise ValueError(f"{module_name}:{attribute} cannot be called: it is of type {type(build).__name__}")
    return build, {}


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that no file there shadows a library
    try:
        importlib.invalidate_caches()  # the file may be newer than the cached directory listing
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"module {error.name!r} is neither installed nor in {here}") from None
        reason = " ".join(str(error).split())
        raise ValueError(f"module {name} cannot be imported: {type(error).__name__}: {reason}") from error


SOURCES: dict[str, Callable[[str], Source]] = {"torchvision": _from_torchvision, "timm": _from_timm}
