"""Defenses of the demo's teacher against the core attacks, with labels and without.

Below demo/defenses: `NAME/teacher`, a network that is protected by its training, from the weights of the normal
teacher, and `NAME/{labels,no_labels}/ATTACK`, its students; `answers/NAME/...`, students of the normal teacher behind
an answer defense. What they are compared with is in demo/attacks.
"""
from __future__ import annotations

from experiments.recipes.attacks import DEMO, NO_LABELS
from experiments.recipes.common import Runs, Values
from experiments.recipes.demo import net

PLACE = "demo/defenses"
CORE = ("kd_t1", "kd_t4", "kd_t20", "hard_label", "kd_t1_top2", "htc", "averager", "logit_standardization")
TRAINED: Runs = {
    "nasty_t4": {"defense": "nasty", "temperature": 4, "weight": 0.04},
    "nasty_t1": {"defense": "nasty", "temperature": 1, "weight": 0.04},
    "nasty_light": {"defense": "nasty", "temperature": 20, "weight": 0.04, "trained_layers": "classifier"},
    "nasty_half": {"defense": "nasty", "temperature": 20, "weight": 0.04, "kl_layers": "classifier"},
    **{f"cmim_{weight}": {"defense": "cmim", "weight": weight} for weight in (0.1, 0.3, 1, 3, 10)},
    **{f"moving_{weight}": {"defense": "moving", "temperature": 4, "weight": weight}
       for weight in (0.001, 0.004, 0.01, 0.04, 0.1)},
    "ast": {"defense": "ast"},
    "label_smoothing": {"defense": "label_smoothing", "epsilon": 0.1}}
ANSWERS = ("stingy:2", "temperature:4", "random:0.5", "reverse_sigmoid:0.21", "reverse_sigmoid:1", "mad:0.5", "mad:1",
           "modelguard_w:0.5", "modelguard_w:1", "modelguard_s:1")
# Against answer defenses: a fifth of the pairs and of the epochs that are the defaults
ADAPTIVE: Runs = {"bayes": {"pairs": 20_000}, "ddae_plus": {"pairs": 20_000, "recovery_epochs": 40}}


def protected(name: str) -> Values:
    """A teacher that starts from the weights of the normal one, which is also the adversary of those that have one."""
    normal = f"experiments/{DEMO.teachers.directories['normal']}/{DEMO.teachers.checkpoint}"
    adversary = {"adversarial_model": "net", "adversarial_num_channels": 16, "adversarial_resume": normal}
    own = TRAINED[name]
    return {**net(16, epochs=5), "init_from": normal, **(adversary if own["defense"] == "nasty" else {}), **own}


def thieves(teacher: str, place: str, **answers: str) -> Runs:
    found: Runs = {}
    for folder, labels in (("labels", True), ("no_labels", False)):
        attacks = {name: values for name, values in DEMO.attacks(labels=labels).items() if name in CORE}
        if answers and not labels:
            attacks |= {name: {"attack": name, **values} for name, values in ADAPTIVE.items()}
        for name, values in attacks.items():
            found[f"{place}/{folder}/{name}"] = DEMO.thief(teacher, **values, **answers) | ({} if labels else NO_LABELS)
    return found


def runs() -> Runs:
    found: Runs = {}
    for name in TRAINED:
        found |= {f"{PLACE}/{name}/teacher": protected(name), **thieves(f"{PLACE}/{name}/teacher", f"{PLACE}/{name}")}
    normal = DEMO.teachers.directories["normal"]
    for answer_defense in ANSWERS:
        place = f"{PLACE}/answers/{answer_defense.replace(':', '_')}"
        found |= thieves(normal, place, answer_defense=answer_defense)
    return found
