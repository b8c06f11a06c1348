"""Image classifiers by name: the model zoo, and networks from elsewhere.

    build_model("resnet18", num_classes=100)
    build_model("torchvision:mobilenet_v3_small", num_classes=100)
    build_model("timm:resnet10t", num_classes=100, options={"drop_rate": 0.1})
    build_model("mypackage.networks:build", num_classes=100)

Every network maps images (B, 3, H, W) to logits (B, num_classes). To add one to the zoo, write a file here with a
`@register` line. Do not rename attributes of networks: published checkpoints load by these names.
"""
from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from model.imported import check_logits, find, imported_code
from model.registry import REGISTRY

__all__ = ["MODEL_NAMES", "build_model"]

# Families in the order of listings; others follow, sorted by file name.
_ORDER = ("net", "mlp", "resnet", "preresnet", "densenet", "resnext", "mobilenetv2", "shufflenetv2", "wideresnet")
for _family in dict.fromkeys((*_ORDER, *(module.name for module in pkgutil.iter_modules(__path__)))):
    importlib.import_module(f"{__name__}.{_family}")

MODEL_NAMES: tuple[str, ...] = tuple(REGISTRY)


def build_model(name: str, num_classes: int, *, num_channels: int = 32, dropout_rate: float = 0.0,
                options: Mapping[str, Any] | None = None, image_size: int | None = None) -> nn.Module:
    """Build a randomly initialized network.

    Two attributes are set for the run that trains it: `default_optimizer`, "adam" or "sgd", and `imported_code`, the
    module that `package.module:callable` imported, or None.

    Args:
        name: a name of the zoo, `MODEL_NAMES`; `torchvision:NAME` or `timm:NAME`, without pretrained weights; or
            `package.module:callable`, which is imported and called with the keyword `num_classes`.
        num_channels, dropout_rate: used by `net` only.
        options: constructor arguments of a network that is not in the zoo.
        image_size: height and width in pixels; if given, a network that is not in the zoo is checked to return logits
            for images of this size.

    Raises:
        ValueError: unknown name or option, invalid number of classes, or a network that cannot be built; one line.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    options = dict(options or {})
    if ":" in name:
        build, fixed = find(name)
    elif name in REGISTRY:
        build, fixed = REGISTRY[name].build, {}
        if taken := [key for key in options if _takes(build, key)]:
            raise ValueError(f"{name}: {taken[0]!r} is no option: networks of the zoo have none")
        widths = {"num_channels": num_channels, "dropout_rate": dropout_rate}
        options |= {key: value for key, value in widths.items() if _takes(build, key)}
    else:
        nearest = [known for known in MODEL_NAMES if known.endswith(name.lower())] or \
            get_close_matches(name.lower(), MODEL_NAMES, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"unknown model {name!r}{hint}; choose from {', '.join(MODEL_NAMES)}; or torchvision:NAME, "
                         "timm:NAME, package.module:callable")
    network = _build(name, build, {"num_classes": num_classes, **fixed}, options)
    if image_size and name not in REGISTRY:
        check_logits(network, num_classes, image_size)
    vars(network).update(default_optimizer=REGISTRY[name].optimizer if name in REGISTRY else "sgd",
                         imported_code=imported_code(name))  # not part of the state dict
    return network


def _build(name: str, build: Callable[..., nn.Module], given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Call `build` with fixed arguments and options. Raises ValueError for every failure."""
    for key in (*given, *options):
        if not _takes(build, key):
            raise ValueError(f"{name} takes no keyword argument {key!r}")
        if key in given and key in options:
            raise ValueError(f"{name}: {key!r} is no option: it is always {given[key]!r}")
    try:
        network = build(**given, **options)
    except Exception as error:  # constructors raise anything for invalid arguments
        raise ValueError(f"{name} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returns an object of type {type(network).__name__}, not a torch.nn.Module")
    return network


def _takes(build: Callable[..., nn.Module], key: str) -> bool:
    """Whether the signature of a function or class accepts a keyword argument; true if there is none."""
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):  # builtins
        return True
    by_name = key in parameters and parameters[key].kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD,
                                                             inspect.Parameter.KEYWORD_ONLY)
    return by_name or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
