"""For a CPU: Table 1 in small (docs/results.md), with the CNN as the teacher and 5 or 20 epochs instead of 100, and ABD
with the CNN (docs/backdoors.md).

The results of these runs are committed beside their params.json, so do not change these recipes.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.recipes.common import COSINE, OOD, Runs, Teachers, Values, backdoor_defense, reads, with_seeds

SHORT = Teachers("CIFAR10_short", "net", {"model_name": "net"}, temperature=4, weight=0.04)
TWENTY_EPOCHS = replace(SHORT, folder="CIFAR10_20epochs")
WEIGHT_01 = replace(SHORT, weight=0.1, suffix="_0.1")
TEMPERATURE_20 = replace(SHORT, temperature=20, suffix="_hot")
MEMORIZED = "CIFAR10_short/ablations/sure"  # directory of a nasty teacher and its adversary

PRERESNET20 = {"dataset": "cifar10", "model_name": "preresnet20", "learning_rate": 0.1, "schedule": [4, 6],
               "gamma": 0.1, "batch_size": 128, "num_epochs": 8}


def cnn(channels: int, *, epochs: int = 5, **options: Any) -> Values:
    return {"dataset": "cifar10", "model_name": "net", "num_channels": channels, **options, "dropout_rate": 0.0,
            "learning_rate": 0.001, "schedule": [999], "gamma": 0.1, "batch_size": 128, "num_epochs": epochs}


def short() -> Runs:
    """Runs of 5 epochs (ResNetC-20: 8), also with a larger weight and with a nasty teacher made from the normal one."""
    net, net8 = cnn(32), cnn(8)
    table = {"CIFAR10_short/baseline/net": net, "CIFAR10_short/baseline/net8": net8,
             SHORT.directories["nasty"]: SHORT.nasty(net), **SHORT.students({"net": net, "net8": net8})}
    variants = {WEIGHT_01.directories["nasty"]: WEIGHT_01.nasty(net),
                **WEIGHT_01.students({"net": net, "net8": net8}, kinds=["nasty"]),
                TEMPERATURE_20.directories["nasty"]: TEMPERATURE_20.nasty(net, from_normal=True),
                **TEMPERATURE_20.students({"net8": net8})}
    return {**with_seeds(table, 1, 2), **with_seeds(variants, 1), "CIFAR10_short/baseline/preresnet20": PRERESNET20,
            **SHORT.students({"preresnet20": PRERESNET20})}


def twenty_epochs() -> Runs:
    net, net8 = cnn(32, epochs=20), cnn(8, epochs=20)
    return {"CIFAR10_20epochs/baseline/net": net, "CIFAR10_20epochs/baseline/net8": net8,
            TWENTY_EPOCHS.directories["nasty"]: TWENTY_EPOCHS.nasty(net), **TWENTY_EPOCHS.students({"net8": net8})}


def short_ablations() -> Runs:
    """A run in bfloat16, and a nasty teacher whose adversary memorized a tenth of the images."""
    few_images = {**cnn(32, epochs=40), "subset_fraction": 0.1, "augmentation": 0}
    nasty = SHORT.nasty(few_images) | {"adversarial_resume": f"experiments/{MEMORIZED}/net/last_model.tar"}
    return {"CIFAR10_short/ablations/precision/bf16_net8": cnn(8, precision="bf16"),
            f"{MEMORIZED}/net": few_images, f"{MEMORIZED}/nasty_net": nasty}


def short_abd() -> Runs:
    """A poisoned CNN, and its students with a fifth of the data and without data, with either defense of ABD."""
    place, poison = "CIFAR10_short/abd", {"trigger": "badnet_grid", "target": 0}
    data = {"dataset": "cifar10", "model_name": "net"}
    student = {**data, **reads("teacher", {"model_name": "net"}, f"{place}/teacher", "last_model.tar"), **poison}
    ood = {"method": "ood", **student, **OOD, "num_epochs": 8}
    return with_seeds({f"{place}/teacher": {**data, **poison, **COSINE, "num_epochs": 8},
                       f"{place}/kd": {**student, "subset_fraction": 0.2, "temperature": 6, "alpha": 0.95, **COSINE,
                                       "num_epochs": 20},
                       f"{place}/ood": ood,
                       f"{place}/ood_sv": {**ood, **backdoor_defense("sv")},
                       f"{place}/ood_sr": {**ood, **backdoor_defense("sr", sr_epochs=1)}}, 1, 2)


def runs() -> Runs:
    return {**short(), **twenty_epochs(), **short_ablations(), **short_abd()}
