"""Attacks: losses that train a student on a teacher's answers. One file per attack.

In your own training loop:

    defend = Answers("top_k:3")                                   # defenses.answers: what the interface returns
    answers = defend(teacher_logits)                              # (N, C): one answer for each training image
    attack = build_attack("kd", num_classes=10, temperature=1.0, alpha=1.0).to(device)
    if attack.params.needs_all_answers:                           # `bayes`, `ddae_plus`: learn to undo the defense
        attack.learn_defense(defend, answers)
    attack.prepare(student, images[:2])                           # creates layers that depend on the student
    optimizer = torch.optim.Adam([*student.parameters(), *attack.parameters()], lr=0.001)
    ...
    batch = Batch(images[index], labels[index], index, torch.tensor(float(epoch), device=device))  # utils.data
    loss = attack(student, batch, answers[index])["loss"]

For a thief without labels, pass None as the labels; `attack.params.needs_labels` must be empty then (set `alpha` to 1).
If `attack.build_optimizer(learning_rate)` returns an optimizer (`mkd`), call its `zero_grad` and `step` too, and leave
`attack.parameters()` out of the student's optimizer. docs/steal_and_protect.ipynb has a complete loop.

The contract is `attacks.base.Attack`. To add an attack, write a file here with a `@REGISTRY.register` line. Its
parameters, `--help`, the JSON schema, the rows of docs/parameters.md and the columns of reports follow from the
registry.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from utils.registry import Registry

if TYPE_CHECKING:
    from attacks.base import Attack

    ATTACK_NAMES: tuple[str, ...]

REGISTRY: Registry[type[Attack]] = Registry("attack", package="attacks")


def build_attack(name: str, num_classes: int, **parameters: Any) -> Attack:
    """Build an attack with these parameters; the others have their defaults.

    Raises ValueError for an unknown name, an unknown parameter, or a value outside its range.
    """
    attack = REGISTRY.entry(name).value
    return attack(attack.Params(**parameters), num_classes)


def __getattr__(name: str) -> Any:
    if name == "ATTACK_NAMES":  # computed on access: the files of the attacks import torch
        return tuple(REGISTRY)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
