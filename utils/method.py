"""Base class of attacks and trained-in defenses: a loss with settings from params.json and trainable parameters."""
from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from utils import seeds
from utils.params import MethodParams
from utils.params import Params as RunParams


class Method(nn.Module):
    """A loss as a module.

    Parameters and buffers of the method itself (auxiliary heads, a Markov matrix, running class means) are trained and
    saved with the run; they are not part of the network that the run trains. A step may be recorded as a CUDA graph, so
    `forward` must compute from tensors only: no `.item()`, no Python value that changes between steps; therefore
    `batch.epoch` is a tensor.
    """

    Params: ClassVar[type[MethodParams]] = MethodParams
    seed = 0  # of the random weights that `prepare` creates
    # Mean and standard deviation (3,) of the normalization of the images, on their device, set before `prepare`; None
    # outside a run: images are pixels in [0, 1].
    normalization: tuple[Tensor, Tensor] | None = None

    def __init__(self, params: MethodParams, num_classes: int) -> None:
        super().__init__()
        self.params = params
        self.num_classes = num_classes

    @classmethod
    def from_run(cls, params: RunParams, num_classes: int, **frozen: Any) -> Self:
        """Build the method of a run from its parameters. The method's random weights derive from the run's seed."""
        seed = seeds.derive_seed(params.seed, "method")
        torch.manual_seed(seed)
        own = cls.Params(**{key: getattr(params, key) for key in cls.Params.model_fields})
        method = cls(own, num_classes, **frozen)
        method.seed = seed
        return method

    def prepare(self, network: nn.Module, images: Tensor) -> None:
        """Create the parameters whose shapes depend on the network, on its device. Called once, before the optimizers
        are built. A `forward` that depends on it must call it if nobody has. images: float32 (B, 3, H, W),
        normalized."""

    def build_optimizer(self, learning_rate: float) -> torch.optim.Optimizer | None:
        """Optimizer of the method's own parameters, with a constant learning rate of its own. Only steps with a fused
        SGD or Adam are recorded as CUDA graphs.

        None (the default): the network's optimizer trains them too, at the network's learning rate and with its weight
        decay. learning_rate: the network's initial one.
        """
        return None
