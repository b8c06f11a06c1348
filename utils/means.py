"""Running class means, for methods that replace the output for an image by the mean of its class."""
from __future__ import annotations

import torch
from torch import Tensor, nn

DECAY = 0.99  # of the moving average, per batch with images of the class


class ClassMeans(nn.Module):
    """Exponential moving average by class of values (B, D) of images.

    Each batch with images of a class multiplies the sum of that class by `decay` and adds the values of these images
    with equal weights; dividing by the summed weights corrects the bias of the first batches. `decay` 0 gives the mean
    over the images of the class in the batch.
    """

    sums: Tensor
    weights: Tensor

    def __init__(self, num_classes: int, decay: float = DECAY, *, size: int | None = None) -> None:
        """size: D; None: the number of classes."""
        super().__init__()
        self.decay = decay
        # float64, which autocast and TF32 do not change
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
