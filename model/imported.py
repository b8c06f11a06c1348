"""Networks of other people by name: `torchvision:NAME`, `timm:NAME`, `package.module:callable`.

The libraries are imported only when such a name is asked for. `package.module` is code of the user's own choice; it may
lie in the current directory.
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

# What each source is given, beside the number of classes. Weights come from checkpoints that are read as data.
Source = tuple[Callable[..., nn.Module], dict[str, Any]]


def find(name: str) -> Source:
    """The function that builds the network `name`, SOURCE:NAME, and arguments that options may not replace.

    ValueError of one line for a name that does not exist.
    """
    source, _, what = name.partition(":")
    return SOURCES.get(source, functools.partial(_from_module, source))(what)


def imports_code(name: str) -> bool:
    """Whether a name is `package.module:callable`, code of the user's own choice."""
    module, colon, _ = name.partition(":")
    return bool(colon) and module not in SOURCES


def imported_code(name: str) -> str | None:
    """The module that `package.module:callable` imports, with its file; None for every other name.

    ValueError of one line if it cannot be imported.
    """
    if not imports_code(name):
        return None
    module, _, _ = name.partition(":")
    return f"{module} ({getattr(_import(module), '__file__', None) or 'built in'})"


def check_logits(network: nn.Module, num_classes: int, image_size: int) -> None:
    """ValueError, in one line, unless a network maps images to logits (B, num_classes), in eval mode and in training.

    Runs it on black images, (B, 3, image_size, image_size), and leaves it and random number generators as they were.
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
    """A hint for a message: the name that was meant, or nothing."""
    near = get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _from_torchvision(name: str) -> Source:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}{near_match(name, known)}")
    # The heads beside the classifier are left out: a network here maps images to logits, in training too.
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
        sys.path.append(here)  # last, so that nobody's file replaces a library
    try:
        importlib.invalidate_caches()  # a file may be newer than the listing of its directory
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {error.name!r}, neither installed nor in {here}") from None
        reason = " ".join(str(error).split())
        raise ValueError(f"module {name} cannot be imported: {type(error).__name__}: {reason}") from error


SOURCES: dict[str, Callable[[str], Source]] = {"torchvision": _from_torchvision, "timm": _from_timm}
