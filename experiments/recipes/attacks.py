"""Attacks on a normal and a nasty teacher, with and without labels, and their references.

Every image is sent to the teacher once. FOLDER/attacks contains `alone` (students of smoothed labels, without a
teacher), `controls` and, for each teacher, `labels`, `no_labels` and `foreign` (images of another data set);
FOLDER/ablations/query_budget contains students of different numbers of images.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.recipes import cifar10_short, nasty_teacher
from experiments.recipes.common import Runs, Teachers, Values
from experiments.recipes.demo import NET as DEMO_TEACHERS
from experiments.recipes.demo import net

TEMPERATURES = (1, 2, 4, 10, 20)
SMOOTHING = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
CONTROLS = ("uniform", "class_mean")
# A uniform answer has no top class, and the averager already learns class means.
NO_CONTROL = (("hard_label", "uniform"), ("consensus", "uniform"), ("averager", "class_mean"))
NO_LABELS = {"labels": 0}


@dataclass(frozen=True)
class Grid:
    """The attacks on two teachers by one student."""

    teachers: Teachers
    student: Values  # parameters of the student's network trained from labels
    short: Runs  # shorter delays, by attack; the defaults are meant for longer runs
    augmented: bool  # whether the images are augmented, so that an attack can average views

    @property
    def place(self) -> str:
        return f"{self.teachers.folder}/attacks"

    def name(self, kind: str) -> str:
        """Directory name of the attacks on the "normal" or the "nasty" teacher."""
        return f"{kind}_{self.teachers.name}{self.teachers.suffix}"

    def thief(self, teacher: str, attack: str, **parameters: object) -> Values:
        read = self.teachers.read_by_student(teacher)
        return {**self.student, **read, "queries": "once", "teacher_cache": 1, "attack": attack,
                **self.short.get(attack, {}), **parameters}

    def attacks(self, *, labels: bool) -> Runs:
        """Attack and parameters by name."""
        alpha = {} if labels else {"alpha": 1}
        found: Runs = {f"kd_t{temperature}": {"attack": "kd", "temperature": temperature, **alpha}
                       for temperature in TEMPERATURES}
        found["kd_t1_top2"] = {"attack": "kd", "temperature": 1, **alpha, "interface": "top_k:2"}
        found["kd_t1_round1"] = {"attack": "kd", "temperature": 1, **alpha, "interface": "round:1"}
        for attack in ("htc", "htc_matched", "reverse_kl", "jsd", "dist", "logit_standardization", "averager", "mkd"):
            found[attack] = {"attack": attack, **alpha}
        found |= {attack: {"attack": attack} for attack in ("dkd", "skeptical")}  # use top classes as labels
        found["hard_label"] = {"attack": "hard_label", **({"alpha": 0.5} if labels else {})}
        if labels:
            found |= {attack: {"attack": attack} for attack in ("swap", "consensus")}
        else:  # smoothing averages several views, so it needs augmentation
            found["smoothing"] = {"attack": "smoothing", **({} if self.augmented else {"augmentation": 1})}
        return found

    def controls(self) -> Runs:
        """The attacks that read labels, on answers that do not depend on the image."""
        return {f"{name}_{control}": {"attack": control, "of": values["attack"], "of_parameters": {
            **self.short.get(values["attack"], {}),
            **{key: value for key, value in values.items() if key not in ("attack", "interface")}}}
            for name, values in self.attacks(labels=True).items() if "interface" not in values
            for control in CONTROLS if (name, control) not in NO_CONTROL}

    def chain(self, kind: str) -> Runs:
        """Three students, each the teacher of the next, and a fourth one trained by `scm_chain`, which needs the
        teacher's network. The first three are in no table."""
        runs, source = {}, self.teachers.directories[kind]
        for link in (1, 2, 3):
            place = f"{self.teachers.folder}/ablations/scm_chain/{self.name(kind)}_link{link}"
            runs[place] = self.thief(source, "kd", temperature=4)
            source = place
        return runs | {f"{self.place}/{self.name(kind)}/labels/scm_chain": self.thief(source, "scm_chain")}

    def runs(self) -> Runs:
        found: Runs = {f"{self.place}/alone/label_smoothing_{epsilon}": {**self.student, "label_smoothing": epsilon}
                       for epsilon in SMOOTHING}
        for kind, teacher in self.teachers.directories.items():
            place = f"{self.place}/{self.name(kind)}"
            for folder, labels in (("labels", True), ("no_labels", False)):
                for name, values in self.attacks(labels=labels).items():
                    found[f"{place}/{folder}/{name}"] = self.thief(teacher, **values) | ({} if labels else NO_LABELS)
            if {"num_channels": 32, **self.teachers.network}.items() <= {"num_channels": 32, **self.student}.items():
                found |= self.chain(kind)
        normal = self.teachers.directories["normal"]
        for name, values in self.controls().items():
            found[f"{self.place}/controls/{name}"] = self.thief(normal, **values)
        return found

    def budgets(self, steps: dict[int, tuple[int, int]]) -> Runs:
        """Students of different numbers of images, without labels. steps: (batch size, epochs) by number of images."""
        found: Runs = {}
        for kind, teacher in self.teachers.directories.items():
            for name, values in self.attacks(labels=False).items():
                for budget, (batch_size, epochs) in steps.items() if name in ("kd_t1", "kd_t4", "hard_label") else ():
                    place = f"{self.teachers.folder}/ablations/query_budget/{self.name(kind)}"
                    found[f"{place}/{name}_{budget}"] = {
                        **self.thief(teacher, **values), **NO_LABELS, "query_budget": budget, "batch_size": batch_size,
                        "num_epochs": epochs, "schedule": [epochs - max(1, epochs // 4)]}
        return found

    def foreign(self, transfer_set: str, names: tuple[str, ...] = ("kd_t1", "kd_t4", "hard_label"),
                **parameters: object) -> Runs:
        """Students of foreign images. names: attacks, from those without labels."""
        return {f"{self.place}/{self.name(kind)}/foreign/{name}": {
            **self.thief(teacher, **values), **parameters, "transfer_set": transfer_set}
            for kind, teacher in self.teachers.directories.items()
            for name, values in self.attacks(labels=False).items() if name in names}


DEMO = Grid(DEMO_TEACHERS, net(16), {"dkd": {"warmup_epochs": 1}, "skeptical": {"delay": 0}}, augmented=False)
BUDGETS = {100: (32, 80), 300: (32, 32), 1000: (128, 40), 3000: (128, 14), 10000: (128, 4)}

# Published setting and length with the CNN as teacher; thieves train for a fifth of the length.
CNN = {"dataset": "cifar10", **nasty_teacher.CNN, "model_name": "net"}
CIFAR10_TEACHERS = Teachers("CIFAR10", "net", {"model_name": "net"}, temperature=4, weight=0.04,
                            checkpoint="last_model.tar", baseline="cnn")
CIFAR10 = Grid(CIFAR10_TEACHERS, {**CNN, "num_channels": 8, "num_epochs": 20, "schedule": [15]}, {
    "dkd": {"warmup_epochs": 3}, "skeptical": {"delay": 3}}, augmented=True)
# Five epochs on a CPU: foreign images, and a nasty teacher made from the normal one at temperature 20.
FOREIGN = Grid(replace(cifar10_short.TEMPERATURE_20, folder="CIFAR10_foreign", suffix="", checkpoint="last_model.tar"),
               cifar10_short.cnn(32), {}, augmented=True)
CIFAR100 = Grid(nasty_teacher.CIFAR100.teacher_pair("resnet18"), nasty_teacher.CIFAR100.training("shufflenetv2"), {},
                augmented=True)


def runs() -> Runs:
    nasty = {CIFAR10_TEACHERS.directories["nasty"]: CIFAR10_TEACHERS.nasty(CNN)}
    net8 = {**CNN, "num_channels": 8}
    students = CIFAR10_TEACHERS.students({"net": CNN, "net8": net8})
    return {**DEMO.runs(), **DEMO.budgets(BUDGETS), **nasty, **students, **CIFAR10.runs(), **CIFAR100.runs(),
            "CIFAR10/baseline/net8": net8, f"{CIFAR10.place}/alone/net8": CIFAR10.student,
            **CIFAR10.foreign("cifar100", num_epochs=10, schedule=[7]), **CIFAR100.foreign("cifar10"),
            FOREIGN.teachers.directories["normal"]: FOREIGN.student,
            FOREIGN.teachers.directories["nasty"]: FOREIGN.teachers.nasty(FOREIGN.student, from_normal=True),
            **FOREIGN.foreign("cifar100", ("kd_t1", "kd_t4", "kd_t20", "hard_label"))}
