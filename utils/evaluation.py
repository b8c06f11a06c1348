"""Networks that only answer: frozen ones, and what any network is worth on a part of the data."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils import distributed
from utils.augment import normalise
from utils.data import Batch, Images, in_order
from utils.losses import cross_entropy
from utils.step import autocast
from utils.training import Row


class Frozen:
    """A network that only answers: eval mode, no gradients, logits (B, C) of a batch that a loss may use."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.remembered: Tensor | None = None  # (N, C), of this epoch's view of each training image

    def __call__(self, batch: Batch) -> Tensor:
        if self.remembered is not None:
            return self.remembered[batch.index]
        return self.answer(batch.images)

    def answer(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        with torch.inference_mode():
            logits = self.network(images)
        return logits.clone()  # outside inference mode: a tensor that autograd may save


def evaluate(network: nn.Module, part: Images, dtype: torch.dtype) -> Row:
    """Accuracy in percent (correct of all, exact) and mean cross-entropy in nats over a part of the data, not empty."""
    counts, loss = confusion_matrix(network, part, dtype)
    return {"accuracy": accuracy(counts), "loss": loss}


def accuracy(counts: Tensor) -> float:
    """Of a confusion matrix, in percent."""
    return 100 * counts.trace().item() / counts.sum().item()


def confusion_matrix(network: nn.Module, part: Images, dtype: torch.dtype) -> tuple[Tensor, float]:
    """How many images of each class (row) are taken for which (column), float64 (C, C) on the CPU, over a part of the
    data, not empty, and the mean cross-entropy in nats."""
    device = part.labels.device
    was_training = network.training
    network.eval()
    with torch.inference_mode(), autocast(device, dtype):
        classes = network(normalise(part.images[:1], part.mean, part.std)).shape[1]
        sums = torch.zeros(classes**2 + 1, dtype=torch.float64, device=device)  # of the pairs, and of the losses
        for images, labels in in_order(part):
            logits = network(images)
            sums.index_add_(0, labels * classes + logits.argmax(1), torch.ones_like(labels, dtype=torch.float64))
            sums[-1] += cross_entropy(logits, labels).double() * len(labels)
    network.train(was_training)
    *counts, loss = distributed.sum_over_ranks(sums).tolist()
    return torch.tensor(counts, dtype=torch.float64).view(classes, classes), loss / len(part)
