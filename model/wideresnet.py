"""WideResNet: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.

WRN-d-k for small images: pre-activation, (d - 4) / 6 blocks in each of three groups, k times the channels, no dropout.
In a block that changes the number of channels, the shortcut convolution reads the activated input (after batch norm and
ReLU); in the other blocks the identity path carries the raw input.
"""
from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import register


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out += x if self.shortcut is None else self.shortcut(activated)
        return out


class WideResNet(nn.Module):
    """WideResNet of a given depth and width. Raises ValueError if depth is not 6n + 4 or width is below 1."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"a WideResNet has 6n + 4 layers (10, 16, 22, ...), got {depth}")
        if width < 1:
            raise ValueError(f"a WideResNet has a width of at least 1, got {width}")
        repeats = (depth - 4) // 6

        def group(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            # With a width of 1 the first group keeps its 16 channels and has no shortcut convolution.
            first = Block(in_channels, channels, stride)
            return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(repeats - 1)))

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.group1 = group(16, 16 * width, stride=1)
        self.group2 = group(16 * width, 32 * width, stride=2)
        self.group3 = group(32 * width, 64 * width, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(self.conv1(images))))
        return self.fc(F.relu(self.bn(x), inplace=True).mean((2, 3)))


for _depth, _width in ((16, 1), (16, 2), (28, 2), (40, 1), (40, 2)):
    register(f"wrn{_depth}_{_width}")(partial(WideResNet, _depth, _width))
