"""Pre-activation ResNet: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016,
arXiv:1603.05027.

The thin CIFAR networks (16, 32 and 64 channels, for 32x32 images) that Nasty Teacher calls ResNetC-N. They differ from
the paper in two ways: a shortcut convolution reads the raw input of its block, not the activated one; and the depth in
the name is 6n + 2 for n blocks a stage even from 44 on, where blocks are bottlenecks of three layers (`preresnet110`
thus has the 164 layers of the paper's ResNet-164).
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import register


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out += self.downsample(x)
        return out


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.downsample = _downsample(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        out += self.downsample(x)
        return out


class PreResNet(nn.Module):
    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.depth = depth
        block = BasicBlock if depth < 44 else Bottleneck
        width = block.expansion
        repeats = (depth - 2) // 6

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = block(in_channels, channels, stride)
            return nn.Sequential(first, *(block(width * channels, channels, 1) for _ in range(repeats - 1)))

        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(width * 16, 32, stride=2)
        self.layer3 = stage(width * 32, 64, stride=2)
        self.bn = nn.BatchNorm2d(width * 64)
        self.fc = nn.Linear(width * 64, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, 32, 32):
            shape = "x".join(map(str, images.shape[1:]))
            raise ValueError(f"preresnet{self.depth} takes 3x32x32 images, got {shape}")
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        x = F.relu(self.bn(x), inplace=True)
        return self.fc(x.mean((2, 3)))


for _depth in (20, 32, 44, 56, 110):
    register(f"preresnet{_depth}")(partial(PreResNet, _depth))
