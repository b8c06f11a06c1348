"""Train a nasty teacher: as accurate as a normal one, but useless or harmful as a teacher (Ma et al., ICLR 2021).

    loss = CE(nasty(x), y) - weight * T^2 * KL(softmax(nasty(x) / T) || softmax(adversary(x) / T))

The adversary is a normally trained teacher, frozen. Driving the softened outputs away from its own keeps the right
class on top and fills the rest, which is what a student learns from, with misleading peaks.

    python train_nasty.py --save_path experiments/CIFAR10/kd_nasty_resnet18/nasty_resnet18
    python train_nasty.py --save_path experiments/mine --set weight=0.01

Needs the adversary's checkpoint, `adversarial_resume` of params.json. With `init_from` the nasty teacher starts from
trained weights, which protects an existing model in a few epochs. With a `trigger` the success of that backdoor on the
adversary and on the nasty teacher is measured too. Run it again to continue an interrupted run.
"""
from __future__ import annotations

from torch import Tensor, nn

from backdoor.metrics import watch_backdoor
from model import build_model
from utils.cli import main
from utils.data import Batch
from utils.experiment import Experiment
from utils.losses import nasty_terms
from utils.params import NastyParams


def train_nasty() -> None:
    run = Experiment.from_command_line(NastyParams, build_model, __doc__)
    params = run.params
    nasty = run.network()
    adversary = run.frozen(params.adversarial_model, params.adversarial_resume, role="adversarial",
                           num_channels=params.adversarial_num_channels)
    watch_backdoor(run)

    def loss(nasty: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return nasty_terms(nasty(batch.images), adversary(batch), batch.labels,
                           temperature=params.temperature, weight=params.weight)

    run.train(nasty, loss)


if __name__ == "__main__":
    main(train_nasty)
