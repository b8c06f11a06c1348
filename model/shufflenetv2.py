"""ShuffleNetV2, width 1.0: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", ECCV 2018, arXiv:1807.11164.

The paper's network with a stem for small images: a 3x3 convolution of stride 1 with BN, without ReLU and max-pool.
Every convolution has a bias.
"""

import torch
from torch import Tensor, nn

from model.registry import register


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Interleave the channels of two tensors (B, C, H, W): a0 b0 a1 b1 ..., (B, 2C, H, W)."""
    # Stacking in the order (B, H, W, C) takes one copy, and the result stays channels-last.
    pair = torch.stack((first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)), dim=-1)
    return pair.flatten(3).permute(0, 3, 1, 2)


class Unit(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = out_channels // 2
        # A unit of stride 1 splits its input and transforms one half; one of stride 2 transforms all of it twice.
        hidden = half if stride == 1 else in_channels
        self.residual = nn.Sequential(
            nn.Conv2d(hidden, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, half, 1),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        kept, transformed = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        return _interleave(self.shortcut(kept), self.residual(transformed))


def _stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
    first = Unit(in_channels, out_channels, stride=2)
    return nn.Sequential(first, *(Unit(out_channels, out_channels, stride=1) for _ in range(repeats)))


@register("shufflenetv2")
class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.stage2 = _stage(24, 116, repeats=3)
        self.stage3 = _stage(116, 232, repeats=7)
        self.stage4 = _stage(232, 464, repeats=3)
        self.conv5 = nn.Sequential(nn.Conv2d(464, 1024, 1), nn.BatchNorm2d(1024), nn.ReLU(inplace=True))
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.pre(images))))
        return self.fc(self.conv5(x).mean((2, 3)))
