"""Trained-in and answer defenses against the core attacks of a thief who sends a fixed number of images.

Contents of FOLDER/defenses:
- `none`: students of the normal teacher;
- `continued`: the normal teacher, trained for as many more epochs as the protected ones (`teacher`), and its students;
- `NAME`: a trained-in defense, from the weights of the normal teacher (`teacher`), and its students;
- `NAME_WEIGHT`: a trained-in defense with another weight, only attacked without labels;
- `answers/NAME`: students of the normal teacher behind an answer defense;
- `alone`: students of the same images and their labels, without a teacher.

Except in `alone`, students are in `labels` and `no_labels`.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from experiments.recipes import nasty_teacher
from experiments.recipes.attacks import CIFAR10, CIFAR100, CNN, DEMO, NO_LABELS, Grid
from experiments.recipes.common import Runs, Values
from experiments.recipes.demo import net

CORE = ("kd_t1", "kd_t4", "kd_t20", "hard_label", "kd_t1_top2", "htc", "averager", "logit_standardization")
WEIGHTS = {"cmim": (0.1, 0.3, 1, 3, 10), "moving": (0.001, 0.004, 0.01, 0.04, 0.1)}
MIDDLE = {"cmim": 1, "moving": 0.01}  # also attacked with labels
ANSWERS = ("stingy:2", "temperature:4", "random:0.5", "reverse_sigmoid:1", "mad:0.5", "mad:1", "modelguard_w:0.5",
           "modelguard_w:1", "modelguard_s:1")
SMOOTHING = (0.1, 0.3, 0.5)


@dataclass(frozen=True)
class Defended:
    """The defenses of the normal teacher of a grid."""

    grid: Grid
    teacher: Values  # parameters of the protected network
    budget: Values  # number of images and length of training of a student
    recovery: Values = field(default_factory=dict)  # overrides for the attacks that undo an answer defense

    @property
    def place(self) -> str:
        return f"{self.grid.teachers.folder}/defenses"

    @property
    def normal(self) -> str:
        return self.grid.teachers.directories["normal"]

    def trained(self) -> Runs:
        """Parameters of the trained-in defenses by name, without the sweeps of `WEIGHTS`."""
        nasty_t4, nasty_t20 = ({"defense": "nasty", "temperature": temperature, "weight": self.grid.teachers.weight}
                               for temperature in (4, 20))
        return {"nasty_t4": nasty_t4,
                "nasty_t20": nasty_t20,
                "nasty_t20_light": {**nasty_t20, "trained_layers": "classifier"},
                "nasty_t20_half": {**nasty_t20, "kl_layers": "classifier"},
                **{name: self.swept(name, weight) for name, weight in MIDDLE.items()},
                "ast": {"defense": "ast"},
                "label_smoothing": {"defense": "label_smoothing", "epsilon": 0.1}}

    def swept(self, name: str, weight: float) -> Values:
        return {"defense": name, **({"temperature": 4} if name == "moving" else {}), "weight": weight}

    def protected(self, own: Values) -> Values:
        """A teacher that starts from the weights of the normal one, which is also the adversary, if there is one."""
        normal = f"experiments/{self.normal}/{self.grid.teachers.checkpoint}"
        network = self.grid.teachers.network
        adversary = {"adversarial_model": network["model_name"],
                     **{f"adversarial_{key}": value for key, value in network.items() if key != "model_name"},
                     "adversarial_resume": normal}
        return {**self.teacher, "init_from": normal, **(adversary if own.get("defense") == "nasty" else {}), **own}

    def adaptive(self) -> Runs:
        """Attacks that undo an answer defense."""
        network = {"attack": "ddae_plus", **self.recovery}
        return {"bayes": {"attack": "bayes", **{key: self.recovery[key] for key in ("pairs",) if key in self.recovery}},
                "ddae_plus": network, "ddae_plus_sorted": {**network, "sort_classes": 1}}

    def thieves(self, teacher: str, place: str, folders: tuple[str, ...] = ("labels", "no_labels"),
                **answers: str) -> Runs:
        found: Runs = {}
        for folder in folders:
            labels = folder == "labels"
            attacks = {name: values for name, values in self.grid.attacks(labels=labels).items() if name in CORE}
            if answers and not labels:
                attacks |= self.adaptive()
            for name, values in attacks.items():
                found[f"{place}/{folder}/{name}"] = self.grid.thief(teacher, **values, **answers) | self.budget | (
                    {} if labels else NO_LABELS)
        return found

    def runs(self) -> Runs:
        found = self.thieves(self.normal, f"{self.place}/none")
        place = f"{self.place}/continued"
        found |= {f"{place}/teacher": self.protected({}), **self.thieves(f"{place}/teacher", place)}
        for name, values in self.trained().items():
            place = f"{self.place}/{name}"
            found |= {f"{place}/teacher": self.protected(values), **self.thieves(f"{place}/teacher", place)}
        for name, weights in WEIGHTS.items():
            for weight in weights:
                place = f"{self.place}/{name}_{weight}"
                if weight != MIDDLE[name]:
                    found |= {f"{place}/teacher": self.protected(self.swept(name, weight)),
                              **self.thieves(f"{place}/teacher", place, ("no_labels",))}
        for answers in ANSWERS:
            found |= self.thieves(self.normal, f"{self.place}/answers/{answers.replace(':', '_')}",
                                  answer_defense=answers)
        no_teacher = {**self.grid.student, **self.budget}
        no_teacher["subset_size"] = no_teacher.pop("query_budget")
        found[f"{self.place}/alone/labels"] = no_teacher
        return found | {f"{self.place}/alone/label_smoothing_{epsilon}": {**no_teacher, "label_smoothing": epsilon}
                        for epsilon in SMOOTHING}


# A tenth of the images. Attacks on answer defenses use a fifth of the default pairs and epochs.
DEMO_DEFENDED = Defended(DEMO, net(16, epochs=5), {"query_budget": 1000, "num_epochs": 20, "schedule": [15]}, {
    "pairs": 20_000, "recovery_epochs": 40})
CIFAR10_DEFENDED = Defended(CIFAR10, {**CNN, "num_epochs": 20, "schedule": [15]}, {"query_budget": 5000})
CIFAR100_DEFENDED = Defended(
    CIFAR100, {**nasty_teacher.CIFAR100.training("resnet18"), "num_epochs": 20, "schedule": [15]},
    {"query_budget": 10_000})


def runs() -> Runs:
    return {**DEMO_DEFENDED.runs(), **CIFAR10_DEFENDED.runs(), **CIFAR100_DEFENDED.runs()}
