"""Train a network with a defense against distillation: `nasty` (Ma et al., ICLR 2021) or another one.

    loss = defense(network, (x, y))

    nasty: CE(nasty(x), y) - weight * T^2 * KL(softmax(nasty(x) / T) || softmax(adversary(x) / T))

The adversary of a nasty teacher is a frozen, normally trained teacher. Moving the softened outputs away from those of
the adversary keeps the true class on top, but gives false peaks to other classes, which mislead students.

    python train_nasty.py --save_path experiments/CIFAR10/kd_nasty_resnet18/nasty_resnet18
    python train_nasty.py --save_path experiments/mine --set weight=0.01

`nasty` needs the checkpoint of the adversary, `adversarial_resume` in params.json. With `init_from` the network starts
from trained weights, which protects an existing model in a few epochs. With `trigger` the success of that backdoor on
the network and the adversary is measured too. The same command resumes an interrupted run.
"""
from __future__ import annotations

from functools import partial

import defenses
from backdoor.metrics import measure_backdoor
from model import build_model
from runs.stages import NASTY
from utils.cli import main
from utils.quality import price
from utils.run import Run


def train_nasty() -> None:
    run = Run.from_command_line(NASTY, build_model, __doc__)
    network = run.network()
    method = defenses.REGISTRY[run.params.defense]
    frozen = {role: run.frozen(role) for role in method.frozen_roles}
    defense = method.from_run(run.params, run.dataset.num_classes, **frozen)
    backdoor = measure_backdoor(run)
    original = next((each.network for each in frozen.values()), None)
    outputs = partial(price, part=run.parts["test"], dtype=run.dtype, original=original)
    run.train(network, run.supervised(network, defense, defense), metrics=backdoor.metrics, warnings=backdoor.warnings,
              final={**backdoor.final, "outputs": outputs})


if __name__ == "__main__":
    main(train_nasty)
