"""Demos on the images of the repository, in minutes on two CPU cores (scripts/demo*.sh)."""
from __future__ import annotations

from experiments.recipes.common import Runs, Teachers, Values, ablations, backdoor_defense, reads

NET16 = {"model_name": "net", "num_channels": 16}
NET = Teachers("demo", "net16", NET16, temperature=20, weight=0.04, checkpoint="last_model.tar")


def net(channels: int, *, epochs: int = 4) -> Values:
    """Parameters of a network trained from labels; the learning rate drops before the last epoch."""
    return {"model_name": "net", "num_channels": channels, "dropout_rate": 0.0, "learning_rate": 0.001,
            "schedule": [epochs - 1], "gamma": 0.1, "batch_size": 128, "num_epochs": epochs, "augmentation": 0,
            "dataset": "demo"}


def nasty_teacher() -> Runs:
    """Runs of scripts/demo.sh, scripts/demo_theft.sh and a small scripts/ablations.sh."""
    networks = {"net16": net(16), "net8": net(8)}
    nasty = NET.nasty(net(16, epochs=5), from_normal=True)
    runs = {**{f"demo/baseline/{name}": training for name, training in networks.items()},
            NET.directories["nasty"]: nasty, **NET.students(networks)}
    for kind, teacher in NET.directories.items():
        runs[f"{NET.place(kind)}/deepinversion_net16"] = {
            "method": "deepinversion", "dataset": "demo", **NET16, **NET.read_by_student(teacher),
            "synthesis_steps": 60, "epoch_steps": 150, "learning_rate": 0.05, "num_epochs": 6}
    return runs | ablations(NET, nasty, {"net8": net(8)}, {
        "alpha": [0.1, 0.5], "temperature": [2, 8], "subset_fraction": [0.2, 0.6], "weight": [0.005, 0.015]})


def abd() -> Runs:
    """Runs of scripts/demo_abd.sh."""
    poison = {"trigger": "badnet_sq", "target": 0}
    cosine = {"learning_rate": 0.002, "annealing": "cosine"}
    clean = {"dataset": "demo", **NET16, **cosine, "num_epochs": 8}
    student = {"dataset": "demo", **NET16, **reads("teacher", NET16, "demo/abd/teacher", "last_model.tar"), **poison}
    ood = {"method": "ood", **student, "patches": 30000, "patch_kinds": ["colour", "grey", "blob"], "balance": 1,
           "temperature": 4, **cosine, "batch_size": 128, "num_epochs": 6}
    return {"demo/abd/clean": clean,
            "demo/abd/teacher": {**clean, **poison},
            "demo/abd/kd": {**student, "subset_fraction": 0.2, "temperature": 6, "alpha": 0.95, **cosine,
                            "num_epochs": 20},
            "demo/abd/ood": ood,
            "demo/abd/ood_abd": {**ood, **backdoor_defense("sv", sv_layers=2, sv_weight=0.15)}}


def runs() -> Runs:
    return {**nasty_teacher(), **abd()}
