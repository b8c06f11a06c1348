"""DenseNet-BC: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017,
arXiv:1608.06993.

The ImageNet networks of the paper with a stem for small images: a 3x3 convolution of stride 1, no BN and no max-pool. A
transition has no ReLU between its BN and its convolution.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model.registry import register


class DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.bottle_neck = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False),
            nn.BatchNorm2d(4 * growth_rate),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.bottle_neck(x)), 1)


class Transition(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.down_sample = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.AvgPool2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_sample(x)


# depth: growth rate, dense layers per block
_CONFIGS: dict[int, tuple[int, tuple[int, ...]]] = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}


class DenseNet(nn.Module):
    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        growth_rate, blocks = _CONFIGS[depth]
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.features = nn.Sequential()
        for index, layers in enumerate(blocks):
            if index > 0:
                self.features.add_module(f"transition_layer_{index - 1}", Transition(channels, channels // 2))
                channels //= 2
            block = nn.Sequential()
            for layer in range(layers):
                block.add_module(f"bottle_neck_layer_{layer}", DenseLayer(channels, growth_rate))
                channels += growth_rate
            # The last block breaks the naming scheme in published checkpoints.
            name = f"dense_block_layer_{index}" if index < len(blocks) - 1 else f"dense_block{index}"
            self.features.add_module(name, block)
        self.features.add_module("bn", nn.BatchNorm2d(channels))
        self.features.add_module("relu", nn.ReLU(inplace=True))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(self.conv1(images))
        return self.linear(x.mean((2, 3)))


for _depth in _CONFIGS:
    register(f"densenet{_depth}")(partial(DenseNet, _depth))
