"""Audits of the demo's teachers with a tenth of the images (scripts/demo.sh), and of the CIFAR-10 teachers."""
from __future__ import annotations

from experiments.recipes.attacks import CIFAR10, CNN, DEMO
from experiments.recipes.common import Runs, Teachers, Values
from experiments.recipes.demo import net


def audits(teachers: Teachers, training: Values, **values: object) -> Runs:
    """Audits of the normal teacher, and of the nasty teacher compared with it."""
    places = {kind: f"{teachers.folder}/audits/{kind}" for kind in teachers.directories}
    found: Runs = {place: {**training, "checkpoint": f"experiments/{teachers.directories[kind]}", **values}
                   for kind, place in places.items()}
    found[places["nasty"]]["unprotected"] = f"experiments/{places['normal']}"
    return found


def runs() -> Runs:
    return {**audits(DEMO.teachers, net(16), query_budgets=[1000]),
            **audits(CIFAR10.teachers, {**CNN, "num_epochs": 20, "schedule": [15]}, query_budgets=[5000],
                     students=[{"model_name": "net", "num_channels": 8}])}
