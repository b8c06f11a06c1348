"""ResNeXt-29, 8x64d: Xie, Girshick, Dollár, Tu, He, "Aggregated Residual Transformations for Deep Neural Networks",
CVPR 2017, arXiv:1611.05431.

The CIFAR network of the paper: three stages of three bottlenecks, 8 groups, group width 64 doubling with each stage.
Convolutions have He's normal initialization over the fan-out, the classifier that over the fan-in.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import register

GROUPS = 8


class Bottleneck(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = GROUPS * out_channels // 4
        self.conv_reduce = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=GROUPS, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut.add_module("shortcut_conv", nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn_reduce(self.conv_reduce(x)), inplace=True)
        out = F.relu(self.bn(self.conv_conv(out)), inplace=True)
        out = self.bn_expand(self.conv_expand(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def _stage(name: str, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    stage = nn.Sequential()
    stage.add_module(f"{name}_bottleneck_0", Bottleneck(in_channels, out_channels, stride))
    for index in (1, 2):
        stage.add_module(f"{name}_bottleneck_{index}", Bottleneck(out_channels, out_channels, 1))
    return stage


@register("resnext29")
class ResNeXt29(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        self.stage_1 = _stage("stage_1", 64, 256, stride=1)
        self.stage_2 = _stage("stage_2", 256, 512, stride=2)
        self.stage_3 = _stage("stage_3", 512, 1024, stride=2)
        self.classifier = nn.Linear(1024, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(images)), inplace=True)
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(x.mean((2, 3)))
