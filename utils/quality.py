"""Metrics of a network's answers: quality for honest users, and information for a student.

Answers are log-probabilities (N, C) up to a constant per row, such as logits; -inf for probabilities of exactly 0.
Exact zeros count as probability 1e-6, the row renormalized, so that cross-entropy and KL stay finite.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.data import Images, in_order
from utils.losses import at_least_float32, finite_log_probabilities
from utils.results import Row
from utils.step import autocast, eval_mode

BINS = 15  # of confidence, for the calibration error


def chance_threshold(num_classes: int) -> float:
    """Accuracy in percent below which a network is hardly better than chance: a tenth of the way from chance to 100."""
    chance = 100 / num_classes
    return chance + (100 - chance) / 10


def compute_answers(network: nn.Module, part: Images, dtype: torch.dtype) -> Tensor:
    """Answers of a network to a part of the data, in order and complete in each process: float32 (N, C) on the CPU."""
    with eval_mode(network), torch.inference_mode(), autocast(part.labels.device, dtype):
        batches = [at_least_float32(network(images)).cpu() for images, _ in in_order(part, all_ranks=True)]
    return torch.cat(batches).clone()


def quality(answers: Tensor, labels: Tensor) -> Row:
    """Quality for users of answers (N, C) to images with labels int64 (N,).

    `accuracy` in percent, exact; `cross_entropy` and `entropy`, means in nats; `calibration_error`, expected
    calibration error in percent with 15 bins (Guo et al., ICML 2017, arXiv:1706.04599); `risk_coverage_area` (AURC) in
    percent: error rate on the most confident fraction of the images, averaged over all fractions (Geifman et al., ICLR
    2019, arXiv:1805.08206).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes a second to import

    log_p = finite_log_probabilities(answers)
    error = multiclass_calibration_error(log_p.exp(), labels, num_classes=log_p.shape[1], n_bins=BINS, norm="l1")
    return {
        "accuracy": 100 * (answers.argmax(1) == labels).sum().item() / len(labels),
        "cross_entropy": -log_p.gather(1, labels[:, None]).double().mean().item(),
        "calibration_error": 100 * error.item(),
        "entropy": -(log_p.exp() * log_p).double().sum(1).mean().item(),
        "risk_coverage_area": _risk_coverage_area(answers, labels),
    }


def _risk_coverage_area(answers: Tensor, labels: Tensor) -> float:
    confidence = answers.log_softmax(1).amax(1)
    wrong = (answers.argmax(1) != labels)[confidence.argsort(descending=True, stable=True)].double()
    return 100 * (wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)).mean().item()


def price(network: nn.Module, part: Images, dtype: torch.dtype, original: nn.Module | None = None,
          defend: Callable[[Tensor], Tensor] | None = None) -> Row:
    """All metrics of a network's answers to a part of the data: `quality`, `profile` and `similarity` to the original
    network or, if `defend` maps logits (N, C) to defended answers, to the network's own logits."""
    logits, labels = compute_answers(network, part, dtype), part.labels.cpu()
    answers = defend(logits) if defend else logits  # in one call, since some defenses depend on the order
    row = quality(answers, labels) | profile(answers, labels)
    if original or defend:
        row |= similarity(answers, compute_answers(original, part, dtype) if original else logits)
    return row


def profile(answers: Tensor, labels: Tensor) -> Row:
    """Information beyond the top class in answers (N, C) to images with labels int64 (N,).

    `non_target_mass`: mean total probability of the classes other than the label, percent. `peaks`: mean number of
    classes with at least a tenth of the largest probability. `cmi` in nats: conditional mutual information of image and
    answer given the label, the mean KL of an answer from the mean answer of its class (Yang et al., 2023,
    arXiv:2309.09123). `separation` in nats: mean KL between the mean answers of two different classes. Classes without
    images are left out.
    """
    log_p = finite_log_probabilities(answers).double()
    p = log_p.exp()
    present = labels.unique()
    centroids = torch.stack([p[labels == label].mean(0) for label in present]).log()
    own = centroids[torch.searchsorted(present, labels)]
    between = (centroids.exp() * centroids).sum(1, keepdim=True) - centroids.exp() @ centroids.T
    pairs = max(1, len(present) * (len(present) - 1))
    return {
        "non_target_mass": 100 * (1 - p.gather(1, labels[:, None])).mean().item(),
        "peaks": (p >= 0.1 * p.amax(1, keepdim=True)).double().sum(1).mean().item(),
        "cmi": (p * (log_p - own)).sum(1).mean().item(),
        "separation": between.sum().item() / pairs,
    }


def foreign_auroc(answers: Tensor, foreign: Tensor) -> float:
    """Area under the ROC curve, in percent, for separating test images from foreign ones by the largest probability of
    their answers (N, C) and (M, C) (Hendrycks & Gimpel, ICLR 2017, arXiv:1610.02136)."""
    from torchmetrics.functional.classification import binary_auroc

    confidence = torch.cat([each.log_softmax(1).amax(1).exp() for each in (answers, foreign)])
    known = torch.cat([torch.ones(len(answers), dtype=torch.int64), torch.zeros(len(foreign), dtype=torch.int64)])
    return 100 * binary_auroc(confidence, known).item()


def change(answers: Tensor, original: Tensor) -> float:
    """Mean L1 distance of answers (N, C), as probabilities, from the original ones: 0 to 2."""
    return (answers.softmax(1) - original.softmax(1)).abs().sum(1).double().mean().item()


def agreement(answers: Tensor, reference: Tensor) -> Row:
    """Agreement of the top classes in percent and mean KL(reference || answers) in nats, for answers (N, C) of two
    networks. The lowest index wins a tie."""
    log_p, log_q = finite_log_probabilities(reference), finite_log_probabilities(answers)
    return {"agreement": 100 * (answers.argmax(1) == reference.argmax(1)).double().mean().item(),
            "kl": (log_p.exp() * (log_p - log_q)).double().sum(1).mean().item()}


def similarity(answers: Tensor, reference: Tensor) -> Row:
    """Similarity of the probabilities of two networks, means over answers (N, C).

    `l1_change`: L1 distance, 0 to 2; `rank_correlation`: Spearman's, over the classes other than the top class of the
    reference; left out for two classes.
    """
    row = {"l1_change": change(answers, reference)}
    if answers.shape[1] > 2:
        row["rank_correlation"] = _rank_correlation(*map(finite_log_probabilities, (reference, answers)))
    return row


def _rank_correlation(log_p: Tensor, log_q: Tensor) -> float:
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), False)
    ranks = [_ranks(each[others].view(len(each), -1)) for each in (log_p, log_q)]
    centered = [each - each.mean(1, keepdim=True) for each in ranks]
    norms = [each.norm(dim=1) for each in centered]
    return ((centered[0] * centered[1]).sum(1) / (norms[0] * norms[1]).clamp(min=1e-12)).mean().item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks of each row, float64; equal values share their mean rank."""
    ordered = values.sort(1).values.contiguous()
    below, up_to = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + up_to - 1).double() / 2
