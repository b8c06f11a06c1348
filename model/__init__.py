"""The model zoo: image classifiers by name.

    build_model("resnet18", num_classes=100)

Every network maps a batch of N x 3 x H x W images to N x num_classes logits. To add one, write its file and add a line
to the registry. Attribute names are an interface: published checkpoints load by them.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from model.densenet import DenseNet
from model.mlp import MLP
from model.mobilenetv2 import MobileNetV2
from model.net import Net
from model.preresnet import PreResNet
from model.resnet import ResNet
from model.resnext import ResNeXt29
from model.shufflenetv2 import ShuffleNetV2
from model.wideresnet import WideResNet

_REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "net": Net,
    "mlp": MLP,
    "resnet18": partial(ResNet, 18),
    "resnet34": partial(ResNet, 34),
    "resnet50": partial(ResNet, 50),
    "resnet101": partial(ResNet, 101),
    "resnet152": partial(ResNet, 152),
    "preresnet20": partial(PreResNet, 20),
    "preresnet32": partial(PreResNet, 32),
    "preresnet44": partial(PreResNet, 44),
    "preresnet56": partial(PreResNet, 56),
    "preresnet110": partial(PreResNet, 110),
    "densenet121": partial(DenseNet, 121),
    "densenet161": partial(DenseNet, 161),
    "densenet169": partial(DenseNet, 169),
    "densenet201": partial(DenseNet, 201),
    "resnext29": ResNeXt29,
    "mobilenetv2": MobileNetV2,
    "shufflenetv2": ShuffleNetV2,
    "wrn16_1": partial(WideResNet, 16, 1),
    "wrn16_2": partial(WideResNet, 16, 2),
    "wrn28_2": partial(WideResNet, 28, 2),
    "wrn40_1": partial(WideResNet, 40, 1),
    "wrn40_2": partial(WideResNet, 40, 2),
}

MODEL_NAMES: tuple[str, ...] = tuple(_REGISTRY)


def build_model(name: str, num_classes: int, *, num_channels: int = 32, dropout_rate: float = 0.0) -> nn.Module:
    """Build the network called `name`, freshly initialised; `num_channels` and `dropout_rate` concern `net` only."""
    if name not in _REGISTRY:
        nearest = [known for known in MODEL_NAMES if known.endswith(name.lower())] or \
            get_close_matches(name.lower(), MODEL_NAMES, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"unknown model {name!r}{hint}; choose from {', '.join(MODEL_NAMES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    options = {"num_channels": num_channels, "dropout_rate": dropout_rate} if name == "net" else {}
    return _REGISTRY[name](num_classes, **options)
