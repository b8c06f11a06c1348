"""D-DAE+ (Tang et al., ModelGuard, USENIX Security 2024): a network learns to undo a known answer defense.

The network is a perceptron C - h1 - h2 - C with batch norm and leaky ReLU (slope 0.2) after its hidden layers and a
softmax at the end; h1 and h2 are 128 and 64 for up to 10 classes, 1024 and 512 for up to 100, 2048 and 1024 for more.
The loss is C times the mean absolute error. Training: SGD with learning rate 0.01, halved after half of the epochs,
momentum 0.9, weight decay 1e-4, batches of 1,024 pairs. Published: 200 epochs over 1,000,000 pairs.

The published form fails against ModelGuard-W, which may answer 0.4901, 0.4900 for 0.99, 0.00: the network cannot tell
from such probabilities which class is the top one, and its pairs are drawn around such answers, not around clean ones.
With `sort_classes` (ours) the network sees each answer sorted from the largest probability to the smallest. This
assumes that a defense treats all classes alike. All defenses here do, except `random`, which chooses a class by a hash.
"""
from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from attacks import REGISTRY
from attacks.recovering import Recovering
from utils.params import Switch

BATCH_SIZE = 1024


@REGISTRY.register("ddae_plus", display_name="D-DAE+", source="Tang et al. (ModelGuard), USENIX Security 2024")
class DDAEPlus(Recovering):
    """Undoes a known answer defense by a network that is trained for it, and trains the student on the estimated clean
    answers."""

    class Params(Recovering.Params):
        recovery_epochs: int = Field(
            200, ge=1, description="training epochs of the network that recovers clean answers, over all `pairs`")
        sort_classes: Switch = Field(
            False, description="sort the probabilities from largest to smallest before the network that recovers clean "
                               "answers; published: no")

    params: Params

    def recover(self, observed: Tensor, clean: Tensor, perturbed: Tensor) -> Tensor:
        if not self.params.sort_classes:
            return self._recover(observed, clean, perturbed)
        of_pairs, order = (each.argsort(dim=1, descending=True, stable=True) for each in (perturbed, observed))
        recovered = self._recover(observed.gather(1, order), clean.gather(1, of_pairs), perturbed.gather(1, of_pairs))
        return torch.empty_like(recovered).scatter(1, order, recovered)

    def _recover(self, observed: Tensor, clean: Tensor, perturbed: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            network = recovery_network(observed.shape[1]).to(observed.device)
            self._train(network, clean, perturbed)
        network.eval()
        with torch.no_grad():
            return torch.cat([network(part) for part in observed.split(8 * BATCH_SIZE)])

    def _train(self, network: nn.Module, clean: Tensor, perturbed: Tensor) -> None:
        epochs = self.params.recovery_epochs
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2)], gamma=0.5)
        for _ in range(epochs):
            order = torch.randperm(len(clean), device=clean.device)
            for inputs, targets in zip(perturbed[order].split(BATCH_SIZE), clean[order].split(BATCH_SIZE), strict=True):
                if len(inputs) == 1:  # batch norm needs two rows
                    continue
                loss = clean.shape[1] * (network(inputs) - targets).abs().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()


def recovery_network(num_classes: int) -> nn.Sequential:
    """Perceptron from perturbed to clean probabilities (B, C)."""
    first, second = (128, 64) if num_classes <= 10 else (1024, 512) if num_classes <= 100 else (2048, 1024)
    return nn.Sequential(
        nn.Linear(num_classes, first), nn.BatchNorm1d(first), nn.LeakyReLU(0.2),
        nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU(0.2),
        nn.Linear(second, num_classes), nn.Softmax(1))
