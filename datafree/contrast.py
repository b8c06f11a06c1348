"""Contrastive model inversion's judge of diversity: Fang et al., "Contrastive Model Inversion for Data-Free Knowledge
Distillation", IJCAI 2021, arXiv:2105.08584. Two views of one image shall look alike to it, and no two images."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.features import Captured
from utils.losses import at_least_float32


class ProjectionHead(nn.Module):
    """Features (B, D) to vectors (B, 256), of which the direction counts, through one hidden layer of D."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 256))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class MemoryBank:
    """The features of the last `rows` images: pairs (local view, global view) of D each, the oldest overwritten."""

    def __init__(self, rows: int, features: int, device: torch.device) -> None:
        self.pairs = torch.empty(rows, 2, features, device=device)
        self.added = 0  # of all time

    def __len__(self) -> int:
        return min(self.added, len(self.pairs))

    def add(self, pairs: Tensor) -> None:
        """Remember pairs (B, 2, D), of more than there are rows the last."""
        pairs = pairs[-len(self.pairs):]
        place = torch.arange(self.added, self.added + len(pairs), device=self.pairs.device) % len(self.pairs)
        self.pairs[place] = pairs
        self.added += len(pairs)

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Up to `count` of the pairs that are remembered, without repetition: (n, 2, D)."""
        chosen = torch.randperm(len(self), generator=random)[:count]
        return self.pairs[chosen.to(self.pairs.device)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"pairs": self.pairs[:len(self)].clone(), "added": torch.tensor(self.added)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.pairs[:len(state["pairs"])] = state["pairs"]
        self.added = int(state["added"])


def contrast_loss(head: nn.Module, local_view: Tensor, global_view: Tensor, negatives: Tensor, *,
                  temperature: float) -> Tensor:
    """The cross-entropy of telling which global view belongs to each local one, among all of them.

        logits = v(local) v(global)^T / temperature, v the unit vector of the head, the right factor detached

    Its mean over the present images plus, if any are remembered, its mean over those: apart, so that many of them do
    not dilute the few that can still change.

    Args:
        local_view, global_view: (B, D), features of the two views of the present images.
        negatives: (M, 2, D), of earlier ones.
    """
    queries = head(torch.cat([local_view, negatives[:, 0]]))
    with torch.no_grad():
        keys = head(torch.cat([global_view, negatives[:, 1]]))
    with torch.autocast(queries.device.type, enabled=False):  # differences between thousands of similarities are small
        queries, keys = (F.normalize(at_least_float32(vectors)) for vectors in (queries, keys))
        losses = F.cross_entropy(queries @ keys.T / temperature, torch.arange(len(queries), device=queries.device),
                                 reduction="none")
    present = losses[:len(local_view)].mean()
    return present + losses[len(local_view):].mean() if len(negatives) else present


def instance_means(captured: Captured) -> Tensor:
    """Features of each image: the mean over positions of every captured tensor (B, C, H, W), concatenated to (B, D)."""
    return torch.cat([at_least_float32(call.value).mean((2, 3)) for call in captured.calls], dim=1)
