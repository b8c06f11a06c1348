"""Parameters of every unpublished run, by its directory below experiments/. Start in the file of a data set.

A params.json lists its keys in the order in which a recipe gives them.
"""
from __future__ import annotations

from experiments.recipes import abd, attacks, audits, cifar10_short, defenses, demo, nasty_teacher
from experiments.recipes.common import Runs

PUBLISHED = nasty_teacher.published()  # directories whose params.json stays as published


def all_runs() -> Runs:
    """Parameters by directory. Raises ValueError if a directory has two recipes or a published file."""
    runs: Runs = {}
    for recipe in (nasty_teacher.runs, abd.runs, cifar10_short.runs, demo.runs,
                   attacks.runs, defenses.runs, audits.runs):
        new = recipe()
        if twice := new.keys() & (runs.keys() | PUBLISHED):
            raise ValueError(f"two recipes, or a recipe and a published file, for {', '.join(sorted(twice))}")
        runs |= new
    return runs
