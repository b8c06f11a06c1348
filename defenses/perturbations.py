"""Answer defenses that perturb probabilities: vectorized pure functions of (B, C) with one strength.

    stingy:K            the K largest probabilities, renormalized (Ma et al., ICLR 2022 workshop)
    temperature:T       p^(1 / T), renormalized
    random:EPS          (1 - EPS / 2) p, with EPS / 2 added to another class: a control
    reverse_sigmoid:B   Lee et al., IEEE S&P workshops 2019
    mad:EPS             Orekondy et al., ICLR 2020
    modelguard_w:EPS    Tang et al., USENIX Security 2024
    modelguard_s:EPS    Tang et al., USENIX Security 2024

EPS is the largest L1 distance between an answer and its perturbed form, at most 2. All defenses except
`reverse_sigmoid` and `random` keep the top class. Answers are computed in float64.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from defenses.answers import ANSWER_DEFENSES, Transform, keep_largest, one_hot_top, ordered, parse_integer

MARGIN = 1e-4  # of ModelGuard-W's top class above the others
GOLDEN = (math.sqrt(5) - 1) / 2
SEARCH_STEPS = 45  # of the golden-section search; 0.618^45 is below the precision of float32


def _parse_positive(strength: str, name: str, maximum: float = math.inf) -> float:
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not 0 < value <= maximum:
        limit = f" of at most {maximum:g}" if math.isfinite(maximum) else ""
        raise ValueError(f"takes a number {name}{limit} above 0, as in NAME:0.5")
    return value


@ANSWER_DEFENSES.register("stingy", display_name="stingy", source="Ma et al., ICLR 2022 workshop")
def stingy(strength: str) -> Transform:
    """The K largest probabilities, renormalized; the others are 0."""
    return keep_largest(parse_integer(strength, "K", 1))


@ANSWER_DEFENSES.register("temperature", display_name="temperature")
def temperature(strength: str) -> Transform:
    """The softmax of the logits at temperature T, as p^(1 / T), renormalized."""
    inverse = 1 / _parse_positive(strength, "T")

    def tempered(probabilities: Tensor) -> Tensor:
        return (probabilities.double().log() * inverse).softmax(1).to(probabilities.dtype)

    return tempered


@ANSWER_DEFENSES.register("random", display_name="random (control)")
def random(strength: str) -> Transform:
    """EPS / 2 of the mass of each answer moved to a class other than the top class, chosen by a hash of the answer, so
    equal answers are perturbed equally."""
    epsilon = _parse_positive(strength, "EPS", 2)

    def perturbed(probabilities: Tensor) -> Tensor:
        classes = probabilities.shape[1]
        weights = torch.arange(classes, device=probabilities.device) * 2_654_435_761 + 40_503
        number = (probabilities.float().view(torch.int32).long() * weights).sum(1)
        number = (number ^ (number >> 21)) * 6_364_136_223_846_793_005  # overflow wraps around
        others = (number >> 33).abs() % max(classes - 1, 1)
        top = probabilities.argmax(1)
        noise = torch.zeros_like(probabilities).scatter(1, (others + (others >= top))[:, None] % classes, epsilon / 2)
        return (1 - epsilon / 2) * probabilities + noise

    return perturbed


@ANSWER_DEFENSES.register("reverse_sigmoid", display_name="reverse sigmoid",
                          source="Lee et al., IEEE S&P workshops 2019")
def reverse_sigmoid(strength: str) -> Transform:
    """p - BETA (sigmoid(0.2 logit(p)) - 1/2), clipped at 0 and renormalized. ModelGuard uses BETA 0.21 for CIFAR-10 and
    0.02 for CIFAR-100. A large BETA may change the top class."""
    beta = _parse_positive(strength, "BETA")

    def reversed_(probabilities: Tensor) -> Tensor:
        values = probabilities.double().clamp(1e-12, 1 - 1e-12)
        perturbed = (values - beta * ((0.2 * values.logit()).sigmoid() - 0.5)).clamp(min=0)
        return (perturbed / perturbed.sum(1, keepdim=True)).to(probabilities.dtype)

    return reversed_


@ANSWER_DEFENSES.register("mad", display_name="MAD", source="Orekondy et al., ICLR 2020, arXiv:1906.10908")
def mad(strength: str) -> Transform:
    """Maximizing angular deviation: a step of L1 length up to EPS towards the target that turns the gradient of a
    surrogate most. Targets are the uniform distributions over sets of classes that contain the top class.

    The gradient of the surrogate's last layer is (q - y) h^T for its output q and features h, so no Jacobian is needed:
    the angle is that of q - y' and q - y. For uniform q, as from a surrogate with random weights, the cosine for a set
    S of m classes is (mean of y over S - 1/C) / (sqrt(1/m - 1/C) |q - y|). So the best set of a given size contains
    the top class and the least likely classes, and only C - 1 sizes are compared. The published search tries all sets
    for up to 10 classes, and grows sets greedily for more.
    """
    epsilon = _parse_positive(strength, "EPS", 2)

    def deviated(probabilities: Tensor) -> Tensor:
        y = probabilities.double()
        target = deviating_target(y)
        distance = (target - y).abs().sum(1, keepdim=True)
        step = (epsilon / distance.clamp(min=1e-12)).clamp(max=1)
        return (y + step * (target - y)).to(probabilities.dtype)

    return deviated


def deviating_target(y: Tensor) -> Tensor:
    """MAD's target for probabilities (B, C): uniform over the set of classes that turns the gradient most, plus 1e-5 on
    the top class to keep it on top."""
    classes = y.shape[1]
    top = one_hot_top(y)
    order = (y - 2 * top).argsort(dim=1, stable=True)  # the top class, then the others from the least likely
    sizes = torch.arange(1, classes, device=y.device, dtype=y.dtype)
    means = y.gather(1, order).cumsum(1)[:, :-1] / sizes
    cosine = (means - 1 / classes) / (1 / sizes - 1 / classes).sqrt()  # up to the factor |q - y|
    size = cosine.argmin(1, keepdim=True) + 1
    rank = order.argsort(dim=1)
    target = (rank < size) / size + 1e-5 * top
    return target / target.sum(1, keepdim=True)


@ANSWER_DEFENSES.register("modelguard_w", display_name="ModelGuard-W", source="Tang et al., USENIX Security 2024")
def modelguard_w(strength: str) -> Transform:
    """The least informative answer y' within L1 distance EPS: minimizes sum_c y'_c log(y_c + 1e-6), with the top class
    at least 1e-4 above all others.

    The published code solves a linear program for each answer. For a fixed probability h of the top class, the optimum
    moves as much mass as EPS allows from the most to the least likely of the other classes. Its value is convex in h,
    so a golden-section search finds the best h.
    """
    epsilon = _parse_positive(strength, "EPS", 2)

    def guarded(probabilities: Tensor) -> Tensor:
        y = probabilities.double()
        order = (y + 2 * one_hot_top(y)).argsort(dim=1, stable=True)  # ascending, with the top class last
        values = y.gather(1, order)
        others, top = values[:, :-1], values[:, -1:]
        weights = (others + 1e-6).log()

        def cost(height: Tensor) -> Tensor:
            moved, violation = _move_mass(others, top, height, epsilon)
            return (weights * moved).sum(1, keepdim=True) + (top + 1e-6).log() * height + 1e6 * violation

        low, high = (top - epsilon / 2).clamp(min=0), (top + epsilon / 2).clamp(max=1)
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        cost_left, cost_right = cost(left), cost(right)
        for _ in range(SEARCH_STEPS):  # keeps the half with the lower inner point, an inner point of the next step
            down = cost_left <= cost_right
            low, high = torch.where(down, low, left), torch.where(down, right, high)
            probe = torch.where(down, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
            cost_probe = cost(probe)
            left, right = torch.where(down, probe, right), torch.where(down, left, probe)
            cost_left, cost_right = (torch.where(down, cost_probe, cost_right),
                                     torch.where(down, cost_left, cost_probe))
        height = (low + high) / 2
        moved, violation = _move_mass(others, top, height, epsilon)
        made = torch.cat([moved, 1 - moved.sum(1, keepdim=True)], dim=1)
        made = torch.where(violation > 1e-9, values, made)  # EPS leaves no room for the margin
        return torch.empty_like(y).scatter(1, order, made).to(probabilities.dtype)

    return guarded


def _move_mass(others: Tensor, top: Tensor, height: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Optimal probabilities of the other classes, (B, C - 1), for a top class at `height` (B, 1), and the mass by which
    the limits are violated, (B, 1).

    others: probabilities (B, C - 1), ascending. Each may rise to height - MARGIN; those above this limit must fall to
    it. Then mass moves from the most to the least likely classes, until both meet in one class or EPS is used up.
    """
    limit = (height - MARGIN).clamp(min=0)
    kept = torch.minimum(others, limit)
    gained = (others - kept).sum(1, keepdim=True) + top - height  # mass that must go to other classes; may be < 0
    room = limit - kept
    filled, drained = room.cumsum(1), kept.flip(1).cumsum(1).flip(1)  # cumulative, from either end
    lower = gained.clamp(min=0)
    upper = torch.minimum(epsilon / 2 + (top - height).clamp(max=0), filled[:, -1:])
    meeting = torch.maximum(filled - room, gained + drained - kept).amin(1, keepdim=True)
    given = torch.maximum(torch.minimum(meeting, upper), lower)
    up = (given - (filled - room)).clamp(min=0).minimum(room)
    taken = given - gained
    down = (taken - (drained - kept)).clamp(min=0).minimum(kept)
    return kept + up - down, (lower - upper).clamp(min=0) + (taken - drained[:, :1]).clamp(min=0)


@ANSWER_DEFENSES.register("modelguard_s", display_name="ModelGuard-S", source="Tang et al., USENIX Security 2024")
def modelguard_s(strength: str) -> Transform:
    """Quantization: each answer becomes the first centroid of its top class within L1 distance EPS, or a new centroid.

    The result depends on the order of the rows, and every call starts without centroids. So `"queries": "once"` gets
    the answers to all images from one call, in the order of the training images.
    """
    epsilon = _parse_positive(strength, "EPS", 2)

    def quantized(probabilities: Tensor) -> Tensor:
        made, y = probabilities.clone(), probabilities.double()
        top, number = y.argmax(1), torch.arange(len(y), device=y.device)
        waiting = torch.ones(len(y), dtype=torch.bool, device=y.device)
        while waiting.any():  # in each class, the first answer without a centroid becomes one
            first = torch.full((y.shape[1],), len(y), device=y.device).scatter_reduce(
                0, top, torch.where(waiting, number, len(y)), "amin")
            centroid = first[top].clamp(max=len(y) - 1)
            near = waiting & ((y - y[centroid]).abs().sum(1) <= epsilon)
            made = torch.where(near[:, None], probabilities[centroid], made)
            waiting = waiting & ~near
        return made

    return ordered(quantized)
