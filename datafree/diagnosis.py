"""Diagnosis of a shuffling vaccine and of a student's batch norms on clean and triggered test images, which no
defender has.

For reports only: no method uses these results.
"""
from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from datafree.vaccine import ShuffledTeacher, divergence, suspicious
from utils.data import Images, in_order
from utils.step import autocast


def diagnose(teacher: nn.Module, shuffled: ShuffledTeacher, clean: Images, triggered: Images,
             dtype: torch.dtype) -> dict[str, Any]:
    """Compare teacher and T~ on clean and triggered images. Returns a JSON-serializable dict:

        k_clean, k_triggered                      mean divergence k (`datafree.vaccine.divergence`)
        suspicious_clean, suspicious_triggered    percent of images with the same prediction of teacher and T~
        auc                                       area under the ROC curve of detecting triggered images by a small k
        shuffled_classes                          percent of clean images that T~ assigns to each class

    Without triggered images, their entries are left out.
    """
    answers = {}
    for name, part in (("clean", clean), ("triggered", triggered)):
        if not len(part):
            continue
        with torch.inference_mode(), autocast(part.labels.device, dtype):
            pairs = [(teacher(images), shuffled(images)) for images, _ in in_order(part)]
        answers[name] = tuple(map(torch.cat, zip(*pairs, strict=True)))
    k = {name: divergence(*pair) for name, pair in answers.items()}
    suspicious_masks = {name: suspicious(*pair) for name, pair in answers.items()}
    _, shuffled_logits = answers["clean"]
    return {
        **{f"k_{name}": values.mean().item() for name, values in k.items()},
        **{f"suspicious_{name}": 100 * mask.float().mean().item() for name, mask in suspicious_masks.items()},
        **({"auc": auc(-k["triggered"], -k["clean"])} if "triggered" in k else {}),
        "shuffled_classes": (100 * shuffled_logits.argmax(1).bincount(minlength=shuffled_logits.shape[1])
                             / len(shuffled_logits)).tolist(),
    }


def reestimate_batch_norms(network: nn.Module, images: Iterable[Tensor], dtype: torch.dtype,
                           batches: int = 50) -> nn.Module:
    """Copy of a network whose batch norms have new running statistics: the means over the first `batches` batches, in
    train mode. Separates what a network's weights have learned from what the last steps left in these statistics.
    Dropout masks are the same in each call.

    images: batches (B, C, H, W), normalized, on the network's device. dtype: dtype of the network's arithmetic. Raises
    ValueError without a batch: `update_bn` would set all means to 0.
    """
    network, images = copy.deepcopy(network), iter(images)
    first = next(images, None)
    if first is None:
        raise ValueError("there are no images to estimate the statistics of batch norms from")
    with torch.random.fork_rng(), autocast(next(network.parameters()).device, dtype):
        torch.manual_seed(0)
        update_bn(chain([first], islice(images, batches - 1)), network)
    return network


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve of scores (P,) and (N,): the probability that a positive sample scores above a negative
    one, counting ties half."""
    order = negative.double().sort().values
    positive = positive.double()
    below = torch.searchsorted(order, positive, right=False) + torch.searchsorted(order, positive, right=True)
    return (below.double().mean() / (2 * len(order))).item()
