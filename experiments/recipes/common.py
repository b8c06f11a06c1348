"""Keys and groups of runs that several recipes share."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]  # one params.json
Runs = dict[str, Values]  # by directory below experiments/, or by name in a directory

COSINE = {"learning_rate": 0.002, "annealing": "cosine"}  # of the CNN in runs with backdoors
OOD = {"patches": 30000, "patch_kinds": ["colour", "grey", "blob"], "balance": 1, "temperature": 4, **COSINE,
       "batch_size": 128, "num_epochs": 6}  # students without data by `ood`, for a CPU


def reads(role: str, network: Values, run: str, checkpoint: str) -> Values:
    """Keys to read a frozen network of another run: role "teacher" gives `teacher_model` and `teacher_resume`.

    network: `model_name`, and `num_channels` if not the default; run: directory of the other run.
    """
    keys = {f"{role}_{key.removesuffix('_name')}": value for key, value in network.items()}
    return {**keys, f"{role}_resume": f"experiments/{run}/{checkpoint}"}


def backdoor_defense(name: str, **options: Any) -> Values:
    """Keys of a backdoor defense: sv, sr, sv+sr or auto."""
    return {"backdoor_defense": name, **options}


def with_seeds(runs: Runs, *seeds: int) -> Runs:
    """The runs, and copies with other seeds in DIR/seedN, as from scripts/seeds.py.

    Seed N of a run reads seed N of the runs whose checkpoints it reads, so these need that seed too.
    """
    def seeded(value: Any, seed: int) -> Any:
        return re.sub(r"/(\w+\.tar)$", rf"/seed{seed}/\1", value) if isinstance(value, str) else value

    return runs | {f"{run}/seed{seed}": {"seed": seed, **{key: seeded(value, seed) for key, value in values.items()}}
                   for run, values in runs.items() for seed in seeds}


@dataclass(frozen=True)
class Teachers:
    """A normal and a nasty teacher of one network, the students of both, and their place on disk.

    `FOLDER/baseline/NAME` (or another `baseline`) is the normal teacher; `FOLDER/kd_nasty_NAME/nasty_NAME` is the nasty
    one, trained against it; `FOLDER/kd_{normal,nasty}_NAME/` hold the students.
    """

    folder: str  # of the data set, below experiments/
    name: str  # of the teacher's network in directories
    network: Values  # as `reads` takes it
    temperature: float  # of the nasty teacher's KL term and of the students
    weight: float  # of the nasty teacher's KL term
    checkpoint: str = "best_model.tar"  # checkpoint of a teacher that is read
    suffix: str = ""  # of kd_*_NAME, for a second nasty teacher
    baseline: str = ""  # directory of the normal teacher below FOLDER/baseline; empty: NAME

    def place(self, kind: str) -> str:
        """Directory of the students of the "normal" or the "nasty" teacher."""
        return f"{self.folder}/kd_{kind}_{self.name}{self.suffix}"

    @property
    def directories(self) -> dict[str, str]:
        """Directories of the normal and of the nasty teacher."""
        normal = f"{self.folder}/baseline/{self.baseline or self.name}"
        return {"normal": normal, "nasty": f"{self.place('nasty')}/nasty_{self.name}"}

    def read_by_student(self, teacher: str) -> Values:
        return reads("teacher", self.network, teacher, self.checkpoint)

    def student(self, training: Values, teacher: str) -> Values:
        """A student of the teacher in a directory. training: parameters of the same network without a teacher."""
        return {**training, **self.read_by_student(teacher), "temperature": self.temperature, "alpha": 0.9}

    def students(self, trainings: Runs, kinds: Iterable[str] = ("normal", "nasty")) -> Runs:
        """Students of each teacher, by directory. trainings: parameters without a teacher, by name."""
        return {f"{self.place(kind)}/{name}": self.student(training, self.directories[kind])
                for kind in kinds for name, training in trainings.items()}

    def nasty(self, training: Values, *, from_normal: bool = False) -> Values:
        """The nasty teacher, with the normal one as adversary. from_normal: start from its weights."""
        adversary = reads("adversarial", self.network, self.directories["normal"], self.checkpoint)
        resume = adversary.pop("adversarial_resume")
        start = {"init_from": resume} if from_normal else {}
        return {**training, **adversary, **start, "adversarial_resume": resume,
                "temperature": self.temperature, "weight": self.weight}


def ablations(teachers: Teachers, nasty: Values, students: Runs, values: dict[str, list[float]]) -> Runs:
    """Students of both teachers with other values of alpha, temperature and subset_fraction, and nasty teachers with
    other weights and their students.

    nasty: parameters of the nasty teacher; students: parameters without a teacher by name; values: by parameter.
    A smaller subset_fraction also has a student without a teacher, `alone_NAME`.
    """
    runs: Runs = {}
    for parameter in ("alpha", "temperature", "subset_fraction"):
        for value in values[parameter]:
            place = f"{teachers.folder}/ablations/{parameter}/{value}"
            for name, training in students.items():
                for kind, teacher in teachers.directories.items():
                    runs[f"{place}/{kind}_{name}"] = {**teachers.student(training, teacher), parameter: value}
                if parameter == "subset_fraction":
                    runs[f"{place}/alone_{name}"] = {**training, parameter: value}
    for weight in values["weight"]:
        place = f"{teachers.folder}/ablations/weight/{weight}"
        teacher = f"{place}/nasty_{teachers.name}"
        runs[teacher] = {**nasty, "weight": weight}
        runs |= {f"{place}/{name}": teachers.student(training, teacher) for name, training in students.items()}
    return runs
