"""`mlp`, a perceptron of two hidden layers of 512 units, for 32x32 images.

The logits pass through a ReLU too, as in the published Nasty Teacher code (Ma et al., ICLR 2021, arXiv:2105.07381).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.registry import register


@register("mlp", optimizer="adam")
class MLP(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * 32 * 32, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"mlp takes 3x32x32 images, got {'x'.join(map(str, images.shape[1:]))}")
        x = F.relu(self.fc1(images.flatten(1)), inplace=True)
        x = F.relu(self.fc2(x), inplace=True)
        return F.relu(self.fc3(x), inplace=True)
