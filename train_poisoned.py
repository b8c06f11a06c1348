"""Train a teacher with a backdoor: images with a trigger are classified as the target class.

A fraction of the training images gets the trigger and, unless it is a clean-label trigger, the label of the target
class. The network is then trained on all images by cross-entropy.

    python train_poisoned.py --save_path experiments/CIFAR10/abd/badnet_grid/teacher
    python train_poisoned.py --save_path experiments/mine --set trigger=blend target=3

poisoned.json lists the poisoned images by their index among the training images of the data set. Besides the accuracy,
the logs have the attack success rate (`asr`): the percentage of test images of other classes that are classified as the
target with the trigger. Use last_model.tar, since best_model.tar is selected on the test images. The trigger `cl` needs
a clean classifier (`surrogate_resume`), against which its poisoned images are made adversarial.
"""
from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from backdoor.adversarial import pgd
from backdoor.metrics import measure_backdoor
from backdoor.poison import choose, poison
from backdoor.triggers import build_trigger
from model import build_model
from runs.stages import POISONED
from utils.cli import main
from utils.data import Batch, training_index
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.run import Run


def train_poisoned() -> None:
    run = Run.from_command_line(POISONED, build_model, __doc__)
    params = run.params
    network = run.network()
    trigger = build_trigger(params.trigger, params.dataset)
    train = run.parts["train"]
    backdoor = measure_backdoor(run)

    if trigger.adversarial != bool(params.surrogate_resume):
        raise UserError(f'"surrogate_resume": the trigger {trigger.name} '
                        + ("needs a clean classifier" if trigger.adversarial else "uses no clean classifier"))
    how = {"target": params.target, "rate": params.poison_rate, "holdout": params.clean_fraction, "seed": params.seed}
    replacements = None
    if trigger.adversarial:
        surrogate = run.frozen("surrogate")
        index = choose(train.labels, clean_label=trigger.clean_label, **how)
        replacements = pgd(surrogate.network, train.images[index], train.labels[index], train.mean, train.std)
    poisoned = poison(train.images, train.labels, trigger, replacements=replacements, **how)
    number = training_index(run.dataset, params)["train"]
    chosen = json.dumps({
        "trigger": trigger.name, "target": params.target, "poison_rate": params.poison_rate,
        "clean_fraction": params.clean_fraction, "seed": params.seed, "images": number[poisoned.index.cpu()].tolist()})
    run.log(f"poisoned: {len(poisoned.index)} of {len(train)} training images")
    run.replace_training_images(poisoned.images, poisoned.labels)
    examples = torch.stack([train.images[poisoned.index[:32]], poisoned.images[poisoned.index[:32]]], dim=1)
    images = {"poisoned": examples.flatten(0, 1).permute(0, 3, 1, 2).float() / 255}

    def loss(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": cross_entropy(network(batch.images), batch.labels)}

    run.train(network, run.supervised(network, loss), metrics=backdoor.metrics, warnings=backdoor.warnings,
              final=backdoor.final, images=images, artifacts={"poisoned.json": chosen})


if __name__ == "__main__":
    main(train_poisoned)
