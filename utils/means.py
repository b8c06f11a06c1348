"""Running class means, for methods that replace what a network says about an image by the mean of its class."""
from __future__ import annotations

import torch
from torch import Tensor, nn

DECAY = 0.99  # of the moving average, for each batch that holds the class


class ClassMeans(nn.Module):
    """Exponential moving average, by class, of a quantity (B, D) of the images.

    Each batch that holds images of a class multiplies what was summed for that class by `decay` and adds the images,
    all with the same weight; dividing by the summed weights corrects the bias of the first batches. `decay` 0 is the
    mean over the images of the class in the batch.
    """

    sums: Tensor
    weights: Tensor

    def __init__(self, num_classes: int, decay: float = DECAY, *, size: int | None = None) -> None:
        """size: D; None: the number of classes."""
        super().__init__()
        self.decay = decay
        # float64, which autocast and TF32 leave alone
        self.register_buffer("sums", torch.zeros(num_classes, size or num_classes, dtype=torch.float64))
        self.register_buffer("weights", torch.zeros(num_classes, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, values: Tensor, labels: Tensor) -> Tensor:
        """Update the means with values (B, D) of images with labels (B,), then return the mean of each image's class,
        float32 (B, D)."""
        classes = torch.arange(len(self.weights), device=labels.device)
        member = (classes[:, None] == labels).double()
        counts = member.sum(1)
        kept = 1 - (1 - self.decay) * (counts > 0).double()
        self.sums.mul_(kept[:, None]).add_(member @ values.double())
        self.weights.mul_(kept).add_(counts)
        return (self.sums[labels] / self.weights[labels, None]).float()
