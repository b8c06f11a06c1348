"""Contrastive loss of CMI, which makes images differ from each other: Fang et al., "Contrastive Model Inversion for
Data-Free Knowledge Distillation", IJCAI 2021, arXiv:2105.08584. Two views of one image are a positive pair."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.features import Captured
from utils.losses import at_least_float32


class ProjectionHead(nn.Module):
    """Perceptron from features (B, D) to vectors (B, 256), with one hidden layer of D. Only their direction matters."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 256))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class MemoryBank:
    """Features of the last `rows` images, as pairs (local view, global view) of size D; the oldest are overwritten."""

    def __init__(self, rows: int, features: int, device: torch.device) -> None:
        self.pairs = torch.empty(rows, 2, features, device=device)
        self.added = 0  # pairs so far

    def __len__(self) -> int:
        return min(self.added, len(self.pairs))

    def add(self, pairs: Tensor) -> None:
        """Store pairs (B, 2, D); if there are more pairs than rows, only the last."""
        pairs = pairs[-len(self.pairs):]
        place = torch.arange(self.added, self.added + len(pairs), device=self.pairs.device) % len(self.pairs)
        self.pairs[place] = pairs
        self.added += len(pairs)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draw up to `count` stored pairs, without repetition: (n, 2, D)."""
        chosen = torch.randperm(len(self), generator=random)[:count]
        return self.pairs[chosen.to(self.pairs.device)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"pairs": self.pairs[:len(self)].clone(), "added": torch.tensor(self.added)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.pairs[:len(state["pairs"])] = state["pairs"]
        self.added = int(state["added"])


def contrast_loss(head: nn.Module, local_view: Tensor, global_view: Tensor, negatives: Tensor, *,
                  temperature: float) -> Tensor:
    """Cross-entropy of identifying the global view of each local view among all global views, in nats.

        logits = v(local) v(global)^T / temperature, v the head's output scaled to norm 1, the right factor detached

    The result is the mean over the current images plus the mean over the negatives, if any. The means are separate, so
    that many negatives do not dilute the few images that can still change.

    Args:
        local_view, global_view: (B, D), features of two views of the current images.
        negatives: (M, 2, D), features of both views of earlier images.
    """
    queries = head(torch.cat([local_view, negatives[:, 0]]))
    with torch.no_grad():
        keys = head(torch.cat([global_view, negatives[:, 1]]))
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 is too coarse for thousands of logits
        queries, keys = (F.normalize(at_least_float32(vectors)) for vectors in (queries, keys))
        losses = F.cross_entropy(queries @ keys.T / temperature, torch.arange(len(queries), device=queries.device),
                                 reduction="none")
    present = losses[:len(local_view)].mean()
    return present + losses[len(local_view):].mean() if len(negatives) else present


def instance_means(captured: Captured) -> Tensor:
    """Features (B, D) of each image: means over positions of all captured tensors (B, C, H, W), concatenated."""
    return torch.cat([at_least_float32(call.value).mean((2, 3)) for call in captured.calls], dim=1)
