"""MobileNetV2: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks",
CVPR 2018, arXiv:1801.04381.

For small images: the stem is a 1x1 convolution with padding 1 (32x32 becomes 34x34), and it and the sixth stage have
stride 1 where the paper has 2. Every convolution has a bias; the first block keeps its expansion convolution although
it expands by 1; the classifier is a 1x1 convolution on the pooled features.
"""

from torch import Tensor, nn

from model.registry import register


class InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.has_shortcut:
            out += x
        return out


def _stage(in_channels: int, out_channels: int, repeats: int, stride: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, stride, expansion=6)
    rest = (InvertedResidual(out_channels, out_channels, 1, expansion=6) for _ in range(repeats - 1))
    return nn.Sequential(first, *rest)


@register("mobilenetv2")
class MobileNetV2(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True))
        self.stage1 = InvertedResidual(32, 16, 1, expansion=1)
        self.stage2 = _stage(16, 24, repeats=2, stride=2)
        self.stage3 = _stage(24, 32, repeats=3, stride=2)
        self.stage4 = _stage(32, 64, repeats=4, stride=2)
        self.stage5 = _stage(64, 96, repeats=3, stride=1)
        self.stage6 = _stage(96, 160, repeats=3, stride=1)
        self.stage7 = InvertedResidual(160, 320, 1, expansion=6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True))
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.pre(images))))
        x = self.stage7(self.stage6(self.stage5(self.stage4(x))))
        x = self.conv1(x).mean((2, 3), keepdim=True)
        return self.conv2(x).flatten(1)
