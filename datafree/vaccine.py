"""Shuffling vaccine of ABD: Hong, Zeng, Yu, Lyu, Jia, Zhou, "Revisiting Data-Free Knowledge Distillation with
Poisoned Teachers", ICML 2023, arXiv:2306.02368.

A backdoor acts through a few channels. Permuting the input channels of a teacher's last layers destroys its predictions
for clean images, but an image that acts like a trigger tends to keep its prediction. So a sample is suspicious if the
teacher and its shuffled copies agree. A generator is rewarded for making them disagree (`generator_penalty`). Without a
generator, the student unlearns the teacher's outputs for suspicious samples (`student_loss`).
"""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from model.features import capture_inputs
from utils import seeds
from utils.errors import UserError
from utils.losses import at_least_float32, kl_per_sample

SMALLEST = 1e-12  # smaller divergences of two softmax outputs are rounding errors, and may be negative


class ShuffledTeacher:
    """Ensemble T~: frozen copies of a teacher with permuted input channels in the last convolutions.

    `layers` counts convolutions in order of execution, from the last. Each of them has a separate uniform permutation
    in each of the `members`. Grouped convolutions are permuted within each group. Depth-wise convolutions, with one
    channel per group, are skipped and not counted. All permutations derive from `seed` and the number of the shuffle.

    Raises UserError if the network has too few convolutions, and ValueError if it has forward hooks, which the copies
    would call too: build the ensemble before registering hooks.
    """

    def __init__(self, teacher: nn.Module, *, layers: int | None = None, members: int = 3, seed: int = 0,
                 image_size: int = 32, channels: int = 3) -> None:
        """Copy the teacher and shuffle the copies. The teacher is not changed.

        Args:
            teacher: maps images (B, channels, image_size, image_size) to logits (B, C), on any device.
            layers: number of convolutions to shuffle; None: 5, as published for networks with 16 or more convolutions;
                half of them if there are fewer than 10.
            members: number of shuffled copies.
            seed: seed of the permutations.
            image_size, channels: shape of the black image with which the order of execution is found.
        """
        if any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules()):
            raise ValueError("the teacher has forward hooks, which its shuffled copies would call too")
        self.members = [copy.deepcopy(teacher).eval().requires_grad_(False) for _ in range(members)]
        names = shufflable_convolutions(self.members[0], image_size, channels)
        if layers is None:
            layers = min(5, (len(names) + 1) // 2)
            if not layers:  # unshuffled copies would agree with the teacher on all images
                raise UserError("the vaccine needs a teacher with a convolution of several input channels to shuffle")
        if len(names) < layers:
            raise UserError(f"the vaccine cannot shuffle the last {layers} convolutions of a teacher that has "
                            f"{len(names)}: choose fewer layers")
        self.layers = names[len(names) - layers:]
        convolutions = _convolutions(teacher)
        self._original = {name: convolutions[name].weight.detach().clone() for name in self.layers}
        self._groups = {name: convolutions[name].groups for name in self.layers}
        self._seed, self._shuffles = seed, 0
        self.permutations: list[dict[str, Tensor]] = []  # for each member, by layer: int64 (groups, channels per group)
        self.shuffle()

    def __call__(self, images: Tensor) -> Tensor:
        """Mean of the members' logits, (B, C), at least float32, for normalized images (B, channels, H, W).
        Differentiable by the images; the members have no trainable parameters."""
        return torch.stack([at_least_float32(member(images)) for member in self.members]).mean(0)

    def shuffle(self, number: int | None = None) -> None:
        """Draw the permutations of a shuffle (from 0; None: the next one), and apply them to the members in place."""
        self._shuffles = self._shuffles + 1 if number is None else number + 1
        random = seeds.generator(self._seed, "vaccine", self._shuffles)
        self.permutations = [{name: self._draw(name, random) for name in self.layers} for _ in self.members]
        self._permute()

    def state_dict(self) -> dict[str, Tensor]:
        """Permutations and number of shuffles, as tensors by name."""
        state = {f"{number}.{name}": permutation for number, member in enumerate(self.permutations)
                 for name, permutation in member.items()}
        return {"shuffles": torch.tensor(self._shuffles), **state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`. Raises UserError if it has other layers or members."""
        current = self.state_dict()
        if {name: value.shape for name, value in current.items()} != {
                name: value.shape for name, value in state.items()}:
            raise UserError("the saved vaccine has other layers or members than this one")
        self._shuffles = int(state["shuffles"])
        self.permutations = [{name: state[f"{number}.{name}"].cpu() for name in self.layers}
                             for number in range(len(self.members))]
        self._permute()

    def _draw(self, name: str, random: torch.Generator) -> Tensor:
        channels = self._original[name].shape[1]
        return torch.stack([torch.randperm(channels, generator=random) for _ in range(self._groups[name])])

    @torch.no_grad()
    def _permute(self) -> None:
        for member, permutations in zip(map(_convolutions, self.members), self.permutations, strict=True):
            for name, permutation in permutations.items():
                weight = self._original[name].unflatten(0, (len(permutation), -1))
                index = permutation.to(weight.device)[:, None, :, None, None].expand_as(weight)
                member[name].weight.copy_(weight.gather(2, index).flatten(0, 1))


def shufflable_convolutions(network: nn.Module, image_size: int = 32, channels: int = 3) -> list[str]:
    """Names of the 2-d convolutions with several input channels per group, in the order in which they first run.

    Runs the network once, in its current mode, on one black image (channels, image_size, image_size).
    """
    names = [name for name, module in _convolutions(network).items() if module.weight.shape[1] > 1]
    weight = next(network.parameters())
    with torch.no_grad(), capture_inputs(network, *names) as captured:
        network(torch.zeros(1, channels, image_size, image_size, dtype=weight.dtype, device=weight.device))
    return list(dict.fromkeys(call.name for call in captured.calls))


def _convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def suspicious(teacher_logits: Tensor, shuffled_logits: Tensor) -> Tensor:
    """Mask of the samples with the same prediction of teacher and T~: bool (B,). Logits (B, C)."""
    return teacher_logits.argmax(1) == shuffled_logits.argmax(1)


def divergence(teacher_logits: Tensor, shuffled_logits: Tensor) -> Tensor:
    """k = KL(teacher || T~) / C of each sample, (B,), in nats, at temperature 1. Differentiable by both arguments."""
    return kl_per_sample(teacher_logits, shuffled_logits, temperature=1) / teacher_logits.shape[1]


def generator_penalty(teacher_logits: Tensor, shuffled_logits: Tensor, *, coefficient: float) -> Tensor:
    """Term of a generator's loss: -coefficient * mean of k over the suspicious samples; 0 if there are none.

    Args:
        teacher_logits: (B, C), for the generated images, with gradient graph.
        shuffled_logits: (B, C), `ShuffledTeacher` for the same images, with gradient graph.
        coefficient: weight of the term; k is a mean over classes, so 0.1 suits a loss with such a mean.

    Returns:
        A scalar, at most 0, to add to the generator's loss. Its gradient reaches the images through the teacher and
        T~, but not through the mask.
    """
    mask = suspicious(teacher_logits, shuffled_logits)
    return -coefficient * _mean_where(mask, divergence(teacher_logits, shuffled_logits))


def student_loss(kd_per_sample: Tensor, mask: Tensor, *, coefficient: float, cap: float | Tensor) -> Tensor:
    """Loss of a student, a scalar, for distillation without a generator, with the vaccine:

        mean of kd over the other samples - coefficient * mean of min(kd, cap) over the suspicious samples (`mask`)

    A mean over no samples is 0. The second term is gradient ascent, and kd is unbounded: beyond the cap, a sample is
    forgotten and has no gradient, so the loss is at least -coefficient * cap.

    Args:
        kd_per_sample: (B,), distillation loss of each sample, with gradient graph.
        mask: bool (B,), the suspicious samples (`suspicious`).
        coefficient: weight of the ascent.
        cap: limit for all samples (a float) or for each (B,), in units of `kd_per_sample`; see `ascent_cap`.
    """
    return _mean_where(~mask, kd_per_sample) - coefficient * _mean_where(mask, kd_per_sample.clamp(max=cap))


def ascent_cap(teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(teacher || uniform) of each sample, (B,), in nats: the distillation loss of a uniform prediction."""
    return temperature**2 * kl_per_sample(teacher_logits, torch.zeros_like(teacher_logits), temperature=temperature)


def tail_ratio(k: Tensor) -> float:
    """Fraction of samples (N,) whose log10 k is more than three standard deviations below the mean."""
    exponents = k.detach().double().clamp(min=SMALLEST).log10()
    return (exponents < exponents.mean() - 3 * exponents.std()).double().mean().item()


class Selection:
    """Search for a good shuffle in the first batches of a run, while the vaccine's term is off.

    Call `observe` once per batch with the divergence k. The tail ratio over `batches` batches decides on a shuffle; the
    first `skip` of them do not count, since the generator is untrained. After a rejection, shuffle again: the next
    shuffle is evaluated on another `batches - skip` batches. There are up to `tries` shuffles.

        if selection.observe(divergence(teacher_logits, shuffled_logits)):
            shuffled_teacher.shuffle(selection.number)
        coefficient = selection.found * preset

    With `fallback`, which is ours, the shuffle with the largest tail ratio is used if all were rejected.
    docs/backdoors.md has the measurements behind it.

    The published program keeps the images of the first test and evaluates every shuffle on them. Here, no images are
    kept, and each shuffle is evaluated on the batches that follow.
    """

    def __init__(self, *, batches: int = 50, skip: int = 11, tries: int = 8, min_tail: float = 0.02,
                 fallback: bool = False) -> None:
        """min_tail: tail ratio above which a shuffle is accepted. Raises ValueError unless 0 <= skip < batches."""
        if not 0 <= skip < batches:
            raise ValueError(f"{batches} batches without the first {skip} leave nothing to judge: skip fewer")
        self.ratios: list[float] = []  # tail ratios of the shuffles evaluated so far
        self._batches, self._skip, self._tries, self._min_tail = batches, skip, tries, min_tail
        self._fallback = fallback
        self._stopped = False
        self._num_batches = 0
        self._collected: list[Tensor] = []

    @property
    def accepted(self) -> bool:
        """True if the last shuffle was accepted by its tail ratio."""
        return bool(self.ratios) and self.ratios[-1] > self._min_tail

    @property
    def found(self) -> bool:
        """True if there is a shuffle to use: an accepted one or, with `fallback`, the best of all."""
        return self.accepted or (self._fallback and len(self.ratios) == self._tries)

    @property
    def number(self) -> int:
        """Number of the shuffle to evaluate or, when one is found, to use; from 0."""
        if self.accepted:
            return len(self.ratios) - 1
        return self.ratios.index(max(self.ratios)) if self.found else len(self.ratios)

    @property
    def finished(self) -> bool:
        """True if the search has ended, with or without success."""
        return self.found or self._stopped or len(self.ratios) == self._tries

    @property
    def limit(self) -> int:
        """Maximum number of batches of the search."""
        return self._skip + self._tries * (self._batches - self._skip)

    def stop_search(self) -> None:
        """End the search without success."""
        self._stopped = True

    def observe(self, k: Tensor) -> bool:
        """Add the divergences k (B,) of a batch. Return True if T~ must be shuffled now, to `number`."""
        if self.finished:
            return False
        self._num_batches += 1
        if self._num_batches > self._skip:
            self._collected.append(k.detach().cpu())
        if self._num_batches < self._batches:
            return False
        self.ratios.append(tail_ratio(torch.cat(self._collected)))
        self._num_batches, self._collected = self._skip, []
        return not self.finished or (self.found and not self.accepted)

    def state_dict(self) -> dict[str, Tensor]:
        """State of the search, as tensors by name."""
        return {"seen": torch.tensor(self._num_batches), "given_up": torch.tensor(self._stopped),
                "ratios": torch.tensor(self.ratios, dtype=torch.float64),
                "collected": torch.cat(self._collected) if self._collected else torch.empty(0)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `state_dict`."""
        self._num_batches, self.ratios = int(state["seen"]), state["ratios"].tolist()
        self._stopped = bool(state["given_up"])
        self._collected = [state["collected"]] if len(state["collected"]) else []


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values under the mask; 0 if the mask is empty. Does not synchronize the device."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
