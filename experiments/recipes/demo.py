"""Demos on the images of the repository, in minutes on two CPU cores (scripts/demo*.sh)."""
from __future__ import annotations

from experiments.recipes.abd import TRIGGERS
from experiments.recipes.common import COSINE, OOD, Runs, Teachers, Values, ablations, backdoor_defense, reads

NET16 = {"model_name": "net", "num_channels": 16}
CLEAN = {"dataset": "demo", **NET16, **COSINE, "num_epochs": 8}  # a teacher of demo_abd.sh without a backdoor
VACCINE = {"sv_layers": 2, "sv_weight": 0.15}
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
        student = {"dataset": "demo", **NET16, **NET.read_by_student(teacher)}
        thefts = {"deepinversion": {"method": "deepinversion", **student, "synthesis_steps": 60, "epoch_steps": 150,
                                    "learning_rate": 0.05, "num_epochs": 6},
                  "ood": {"method": "ood", **student, **OOD}}
        for name, theft in thefts.items():
            runs[f"{NET.place(kind)}/{name}_net16"] = theft
            runs[f"{NET.place(kind)}_t1/{name}_net16"] = {**theft, "temperature": 1}
        runs[f"{NET.place(kind)}_label/ood_net16"] = {**thefts["ood"], "temperature": 1, "interface": "label"}
    return runs | ablations(NET, nasty, {"net8": net(8)}, {
        "alpha": [0.1, 0.5], "temperature": [2, 8], "subset_fraction": [0.2, 0.6], "weight": [0.005, 0.015]})


def abd() -> Runs:
    """Runs of scripts/demo_abd.sh, and its vaccine with other weights."""
    poison = {"trigger": "badnet_sq", "target": 0}
    student = {"dataset": "demo", **NET16, **reads("teacher", NET16, "demo/abd/teacher", "last_model.tar"), **poison}
    ood = {"method": "ood", **student, **OOD}
    vaccinated = {**ood, **backdoor_defense("sv", **VACCINE)}
    return {"demo/abd/clean": CLEAN,
            "demo/abd/teacher": {**CLEAN, **poison},
            "demo/abd/kd": {**student, "subset_fraction": 0.2, "temperature": 6, "alpha": 0.95, **COSINE,
                            "num_epochs": 20},
            "demo/abd/ood": ood,
            "demo/abd/ood_abd": vaccinated,
            **{f"demo/ablations/sv_weight/{weight}/ood_abd": {**vaccinated, "sv_weight": weight}
               for weight in (0.1, 0.2)}}


def backdoor(trigger: str) -> Runs:
    """A teacher with a backdoor, and its students without data by backdoor defense (docs/backdoors.md).

    Self-retrospection (`ood_sr`, `ood_sv_sr`) continues a finished student for one epoch. `ood_plain` and `ood_sv_sv`
    are its controls, the same epoch without it. `ood_sr_plain` is an epoch without defense after self-retrospection,
    and `ood_plain_plain` its control.
    """
    place, poison = f"demo/triggers/{trigger}", {"trigger": trigger, "target": 0}
    teacher = {**CLEAN, **poison}
    if trigger == "cl":  # its adversarial images need a clean classifier
        teacher |= reads("surrogate", NET16, "demo/abd/clean", "last_model.tar")
    student = {"dataset": "demo", **NET16, **reads("teacher", NET16, f"{place}/teacher", "last_model.tar"), **poison}
    ood = {"method": "ood", **student, **OOD, "num_epochs": 3}
    epoch = {**ood, "patches": 6400, "batch_size": 64, "num_epochs": 1}  # 100 steps
    plain, retrospection = {"learning_rate": 0.0005}, {"sr_epochs": 1}

    def after(run: str) -> Values:
        return {"init_from": f"experiments/{place}/{run}/last_model.tar"}

    runs = {"teacher": teacher, "ood": ood, "ood_sv": {**ood, **backdoor_defense("sv", **VACCINE)},
            "ood_auto": {**ood, **backdoor_defense("auto", **VACCINE, sv_batches=20, sv_fallback=1)},
            "ood_plain": {**epoch, **after("ood"), **plain},
            "ood_sr": {**epoch, **after("ood"), **backdoor_defense("sr", **retrospection)},
            "ood_sr_plain": {**epoch, **after("ood_sr"), **plain},
            "ood_plain_plain": {**epoch, **after("ood_plain"), **plain},
            "ood_sv_sv": {**epoch, **after("ood_sv"), **plain, **backdoor_defense("sv", **VACCINE)},
            "ood_sv_sr": {**epoch, **after("ood_sv"), **backdoor_defense("sv+sr", **VACCINE, **retrospection)}}
    return {f"{place}/{name}": values for name, values in runs.items()}


def runs() -> Runs:
    triggers = {name: run for trigger in TRIGGERS for name, run in backdoor(trigger).items()}
    return {**nasty_teacher(), **abd(), **triggers}
