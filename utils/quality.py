"""What the answers of a network are worth: accuracy, calibration, entropy, and agreement with another network.

Answers are log-probabilities (N, C) up to a constant per row, such as logits; -inf where an interface gave exactly 0.
Exact zeros count as probability 1e-6, the row renormalized, so that cross-entropy and KL stay finite.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.data import Images, in_order
from utils.losses import at_least_float32, finite_log_probabilities
from utils.results import Row
from utils.step import autocast

BINS = 15  # of the confidence, for the calibration error


def answers_to(network: nn.Module, part: Images, dtype: torch.dtype) -> Tensor:
    """Answers of a network to a part of the data, in its order: float32 (N, C) on the CPU."""
    network.eval()
    with torch.inference_mode(), autocast(part.labels.device, dtype):
        batches = [at_least_float32(network(images)).cpu() for images, _ in in_order(part)]
    return torch.cat(batches).clone()


def quality(answers: Tensor, labels: Tensor) -> Row:
    """Accuracy (percent, exact), cross-entropy and entropy (nats), and expected calibration error (percent, 15 bins;
    Guo et al., ICML 2017, arXiv:1706.04599), of answers (N, C) and labels int64 (N,)."""
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes a second to import

    log_p = finite_log_probabilities(answers)
    error = multiclass_calibration_error(log_p.exp(), labels, num_classes=log_p.shape[1], n_bins=BINS, norm="l1")
    return {
        "accuracy": 100 * (answers.argmax(1) == labels).sum().item() / len(labels),
        "cross_entropy": -log_p.gather(1, labels[:, None]).double().mean().item(),
        "calibration_error": 100 * error.item(),
        "entropy": -(log_p.exp() * log_p).double().sum(1).mean().item(),
    }


def agreement(answers: Tensor, reference: Tensor) -> Row:
    """How often two networks' top classes agree (percent), and KL(reference || network) in nats, mean over the images;
    both of answers (N, C). The lowest index wins a tie."""
    log_p, log_q = finite_log_probabilities(reference), finite_log_probabilities(answers)
    return {"agreement": 100 * (answers.argmax(1) == reference.argmax(1)).double().mean().item(),
            "kl": (log_p.exp() * (log_p - log_q)).double().sum(1).mean().item()}
