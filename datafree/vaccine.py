"""The shuffling vaccine of ABD: Hong, Zeng, Yu, Lyu, Jia, Zhou, "Revisiting Data-Free Knowledge Distillation with
Poisoned Teachers", ICML 2023, arXiv:2306.02368.

A backdoor fires through a few channels. Permuting the channels of a teacher's last layers destroys its clean
predictions, but an input that acts like a trigger tends to keep its own: where the teacher and its shuffled copies
agree, a sample is suspicious. A generator is rewarded for making them disagree (`generator_penalty`); without a
generator, the student is driven off what the teacher says of suspicious samples (`student_loss`).
"""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from model.features import capture_inputs
from utils import seeds
from utils.errors import UserError
from utils.losses import at_least_float32, kl_per_sample

SMALLEST = 1e-12  # below it the divergence of two softmax outputs is rounding, and may even be negative


class ShuffledTeacher:
    """The ensemble T~: frozen copies of a teacher whose last convolutions have their input channels permuted.

    `layers` counts convolutions by type and in order of execution, from the last; each of them gets its own uniform
    permutation in each of the `members`. A grouped convolution is permuted within each group. A depth-wise one, with
    one channel per group, has nothing to permute and does not count. UserError if the network has too few.

    All permutations derive from `seed` and the number of the shuffle. ValueError for a teacher with forward hooks,
    which the copies would call as well: build the ensemble before any are registered.
    """

    def __init__(self, teacher: nn.Module, *, layers: int | None = None, members: int = 3, seed: int = 0,
                 image_size: int = 32, channels: int = 3) -> None:
        """Copy the teacher, which is not changed, and shuffle the copies.

        Args:
            teacher: maps images (B, channels, image_size, image_size) to logits (B, C), on any device.
            layers: number of convolutions to shuffle; None: 5, as published for networks of 16 convolutions and more,
                but half of fewer than 10.
            members: number of shuffled copies.
            seed: seed of the permutations.
            image_size, channels: shape of the black image that finds the convolutions in order of execution.
        """
        if any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules()):
            raise ValueError("the teacher has forward hooks, which its shuffled copies would call too")
        self.members = [copy.deepcopy(teacher).eval().requires_grad_(False) for _ in range(members)]
        names = shufflable_convolutions(self.members[0], image_size, channels)
        if layers is None:
            layers = min(5, (len(names) + 1) // 2)
            if not layers:  # unshuffled copies would agree with the teacher on every image
                raise UserError("the vaccine needs a teacher with a convolution of several input channels to shuffle")
        if len(names) < layers:
            raise UserError(f"the vaccine cannot shuffle the last {layers} convolutions of a teacher that has "
                            f"{len(names)}: choose fewer layers")
        self.layers = names[len(names) - layers:]
        convolutions = _convolutions(teacher)
        self._original = {name: convolutions[name].weight.detach().clone() for name in self.layers}
        self._groups = {name: convolutions[name].groups for name in self.layers}
        self._seed, self._shuffles = seed, 0
        self.permutations: list[dict[str, Tensor]] = []  # per member and layer: int64 (groups, channels per group)
        self.shuffle()

    def __call__(self, images: Tensor) -> Tensor:
        """Mean of the members' logits, (B, C) in float32 at least, for images (B, channels, H, W) as the teacher takes
        them. Gradients reach the images; the members have no trainable parameter."""
        return torch.stack([at_least_float32(member(images)) for member in self.members]).mean(0)

    def shuffle(self) -> None:
        """Draw the next permutations; the members stay the same objects."""
        self._shuffles += 1
        random = seeds.generator(self._seed, "vaccine", self._shuffles)
        self.permutations = [{name: self._draw(name, random) for name in self.layers} for _ in self.members]
        self._permute()

    def state_dict(self) -> dict[str, Tensor]:
        """The permutations and their number, as plain tensors by name."""
        state = {f"{number}.{name}": permutation for number, member in enumerate(self.permutations)
                 for name, permutation in member.items()}
        return {"shuffles": torch.tensor(self._shuffles), **state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave. UserError if that was of other layers or members."""
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
    """The names of the 2-d convolutions with several input channels per group, in the order in which they first run.

    Runs the network once, in the mode it is in, on one black image (channels, image_size, image_size).
    """
    names = [name for name, module in _convolutions(network).items() if module.weight.shape[1] > 1]
    weight = next(network.parameters())
    with torch.no_grad(), capture_inputs(network, *names) as captured:
        network(torch.zeros(1, channels, image_size, image_size, dtype=weight.dtype, device=weight.device))
    return list(dict.fromkeys(call.name for call in captured.calls))


def _convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def suspicious(teacher_logits: Tensor, shuffled_logits: Tensor) -> Tensor:
    """Which samples the teacher and T~ predict alike: bool (B,)."""
    return teacher_logits.argmax(1) == shuffled_logits.argmax(1)


def divergence(teacher_logits: Tensor, shuffled_logits: Tensor) -> Tensor:
    """k = KL(teacher || T~) / C of each sample at temperature 1: (B,); gradients reach both arguments."""
    return kl_per_sample(teacher_logits, shuffled_logits, temperature=1) / teacher_logits.shape[1]


def generator_penalty(teacher_logits: Tensor, shuffled_logits: Tensor, *, coefficient: float) -> Tensor:
    """Term of a generator's loss: -coefficient * mean of k over the suspicious samples, 0 without any.

    Args:
        teacher_logits: (B, C), of the generated images, with their graph.
        shuffled_logits: (B, C), `ShuffledTeacher` of the same images, with their graph.
        coefficient: weight of the term; k is a mean over classes, so 0.1 suits a loss that is one too.

    Returns:
        A scalar, at most 0, to add to the generator's loss. Its gradient reaches the images through the teacher and
        through T~. The mask is not differentiated.
    """
    mask = suspicious(teacher_logits, shuffled_logits)
    return -coefficient * _mean_where(mask, divergence(teacher_logits, shuffled_logits))


def student_loss(kd_per_sample: Tensor, mask: Tensor, *, coefficient: float, cap: float | Tensor) -> Tensor:
    """Loss of a student, a scalar, for distillation without a generator under the vaccine:

        mean of kd over the others - coefficient * mean of min(kd, cap) over the suspicious samples (`mask`)

    A mean over no samples is 0. The second term is gradient *ascent*, and kd has no upper bound: past the cap a sample
    counts as forgotten and has no gradient, so the loss stays above -coefficient * cap.

    Args:
        kd_per_sample: (B,), distillation loss of each sample, with the student's graph.
        mask: bool (B,), `suspicious` of teacher and T~ for the same images.
        coefficient: weight of the ascent.
        cap: of all samples (a float) or of each (B,), in the units of `kd_per_sample`; see `ascent_cap`.
    """
    return _mean_where(~mask, kd_per_sample) - coefficient * _mean_where(mask, kd_per_sample.clamp(max=cap))


def ascent_cap(teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(teacher || uniform) of each sample, (B,): how far from the teacher a student is that knows nothing."""
    return temperature**2 * kl_per_sample(teacher_logits, torch.zeros_like(teacher_logits), temperature=temperature)


def tail_ratio(k: Tensor) -> float:
    """The share of samples whose log10 k (N,) lies more than three standard deviations below the mean."""
    exponents = k.detach().double().clamp(min=SMALLEST).log10()
    return (exponents < exponents.mean() - 3 * exponents.std()).double().mean().item()


class Selection:
    """The search for a good shuffle, during the first batches of a run whose penalty is still off.

    Watch the divergence k of each batch once; after `batches` of them, of which the first `skip` show an untrained
    generator and do not count, the shuffle is judged by its tail ratio. A refused one is drawn anew and judged after
    another `batches - skip`, up to `tries` times.

        if selection.observe(divergence(teacher_logits, shuffled_logits)):
            shuffled_teacher.shuffle()
        coefficient = selection.found * preset
    """

    def __init__(self, *, batches: int = 50, skip: int = 11, tries: int = 8, min_tail: float = 0.02) -> None:
        """min_tail: the tail ratio above which a shuffle is accepted."""
        if not 0 <= skip < batches:
            raise ValueError(f"{batches} batches of which the first {skip} do not count leave nothing to judge")
        self.ratios: list[float] = []  # of the shuffles judged so far
        self._batches, self._skip, self._tries, self._min_tail = batches, skip, tries, min_tail
        self._stopped = False
        self._num_batches = 0
        self._collected: list[Tensor] = []

    @property
    def found(self) -> bool:
        """Whether the present shuffle was accepted."""
        return bool(self.ratios) and self.ratios[-1] > self._min_tail

    @property
    def finished(self) -> bool:
        """Whether the search has ended, with or without success."""
        return self.found or self._stopped or len(self.ratios) == self._tries

    @property
    def limit(self) -> int:
        """Batches that the search takes at most."""
        return self._skip + self._tries * (self._batches - self._skip)

    def stop_search(self) -> None:
        """End the search without success."""
        self._stopped = True

    def observe(self, k: Tensor) -> bool:
        """Watch one batch (B,). True if its shuffle was refused and another is to be tried: re-shuffle T~ now."""
        if self.finished:
            return False
        self._num_batches += 1
        if self._num_batches > self._skip:
            self._collected.append(k.detach().cpu())
        if self._num_batches < self._batches:
            return False
        self.ratios.append(tail_ratio(torch.cat(self._collected)))
        self._num_batches, self._collected = self._skip, []
        return not self.finished

    def state_dict(self) -> dict[str, Tensor]:
        """Where the search stands, as plain tensors by name."""
        return {"seen": torch.tensor(self._num_batches), "given_up": torch.tensor(self._stopped),
                "ratios": torch.tensor(self.ratios, dtype=torch.float64),
                "collected": torch.cat(self._collected) if self._collected else torch.empty(0)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self._num_batches, self.ratios = int(state["seen"]), state["ratios"].tolist()
        self._stopped = bool(state["given_up"])
        self._collected = [state["collected"]] if len(state["collected"]) else []


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """The mean of the values where the mask is true, 0 where it nowhere is; needs no look at the mask's content."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
