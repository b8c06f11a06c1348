"""Train a network on labels only: a normal teacher, or the baseline of a student.

    loss = CE(network(x), y)      with `label_smoothing` E: CE(network(x), (1 - E) * one_hot(y) + E / classes)

    python train_scratch.py --save_path experiments/CIFAR10/baseline/resnet18
    python train_scratch.py --save_path experiments/CIFAR10/baseline/cnn --set seed=1 'schedule=[40,80]'
    torchrun --nproc_per_node=4 train_scratch.py --save_path experiments/CIFAR10/baseline/resnet18

The same command resumes an interrupted run.
"""
from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from model import build_model
from runs.stages import SCRATCH
from utils.cli import main
from utils.data import Batch
from utils.losses import cross_entropy
from utils.quality import price
from utils.run import Run


def train_scratch() -> None:
    run = Run.from_command_line(SCRATCH, build_model, __doc__)
    network, smoothing = run.network(), run.params.label_smoothing

    def loss(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": cross_entropy(network(batch.images), batch.labels, label_smoothing=smoothing)}

    outputs = partial(price, part=run.parts["test"], dtype=run.dtype)
    run.train(network, run.supervised(network, loss), final={"outputs": outputs})


if __name__ == "__main__":
    main(train_scratch)
