"""`net`, the "plain CNN" student of Nasty Teacher (Ma et al., ICLR 2021, arXiv:2105.07381), for 32x32 images.

Three times [3x3 convolution, BN, 2x2 max-pool, ReLU] with c, 2c and 4c channels, then a hidden layer of 4c units.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import register


@register("net", optimizer="adam")
class Net(nn.Module):
    def __init__(self, num_classes: int, *, num_channels: int = 32, dropout_rate: float = 0.0) -> None:
        super().__init__()
        c = num_channels
        self.conv1 = nn.Conv2d(3, c, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, 2 * c, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * c)
        self.conv3 = nn.Conv2d(2 * c, 4 * c, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.fc1 = nn.Linear(4 * c * 4 * 4, 4 * c)
        self.fcbn1 = nn.BatchNorm1d(4 * c)
        self.dropout = nn.Dropout(dropout_rate)
        self.fc2 = nn.Linear(4 * c, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"net takes 3x32x32 images, got {'x'.join(map(str, images.shape[1:]))}")
        x = F.relu(F.max_pool2d(self.bn1(self.conv1(images)), 2), inplace=True)
        x = F.relu(F.max_pool2d(self.bn2(self.conv2(x)), 2), inplace=True)
        x = F.relu(F.max_pool2d(self.bn3(self.conv3(x)), 2), inplace=True)
        x = F.relu(self.fcbn1(self.fc1(x.flatten(1))), inplace=True)
        return self.fc2(self.dropout(x))
