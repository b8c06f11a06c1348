"""Tables 1 to 3 of the Nasty Teacher paper: CIFAR-10, CIFAR-100 and Tiny-ImageNet.

The authors published the parameters of the baselines, the nasty teachers, and the students whose network differs from
their teacher's. These recipes add students of the same network, students without data, and the ablations.
"""
from __future__ import annotations

from dataclasses import dataclass

from experiments.recipes.common import Runs, Teachers, Values, ablations

CNN = {"num_channels": 32, "dropout_rate": 0.0, "learning_rate": 0.001, "schedule": [999], "gamma": 0.1,
       "batch_size": 128, "num_epochs": 100}
CIFAR10_SGD = {"learning_rate": 0.1, "schedule": [80, 120], "gamma": 0.1, "batch_size": 128, "num_epochs": 160}
CIFAR100_SGD = {"learning_rate": 0.1, "schedule": [60, 120, 160], "gamma": 0.2, "batch_size": 128, "num_epochs": 200}
DATA_FREE = ("dafl", "deepinversion")


@dataclass(frozen=True)
class Table:
    """Networks and training parameters of one table of the paper."""

    folder: str
    dataset: str
    sgd: Values  # of every network but the CNN
    temperature: float
    weight: float
    teachers: tuple[str, ...]
    students: tuple[str, ...]
    others: tuple[str, ...]  # baselines that are neither teachers nor students

    def teacher_pair(self, network: str) -> Teachers:
        return Teachers(self.folder, network, {"model_name": network}, self.temperature, self.weight)

    def training(self, name: str) -> Values:
        """Parameters of a network trained from labels, in the key order of the published files; `cnn` means `net`."""
        recipe = {"model_name": "net", **CNN} if name == "cnn" else {"model_name": name, **self.sgd}
        return {**recipe, "num_workers": 4, "augmentation": 1, "cuda": 1, "dataset": self.dataset}


CIFAR10 = Table("CIFAR10", "cifar10", CIFAR10_SGD, temperature=4, weight=0.04, teachers=("resnet18",),
                students=("cnn", "preresnet20", "preresnet32"), others=("resnext29",))
CIFAR100 = Table("CIFAR100", "cifar100", CIFAR100_SGD, temperature=20, weight=0.005,
                 teachers=("resnet18", "resnet50", "resnext29"), students=("shufflenetv2", "mobilenetv2", "resnet18"),
                 others=())
TINY_IMAGENET = Table("TinyImageNet", "tiny_imagenet", CIFAR100_SGD, temperature=20, weight=0.01,
                      teachers=CIFAR100.teachers, students=CIFAR100.students, others=())
TABLES = (CIFAR10, CIFAR100, TINY_IMAGENET)


def published() -> set[str]:
    """Directories of the published runs, below experiments/."""
    directories = set()
    for table in TABLES:
        directories |= {f"{table.folder}/baseline/{name}" for name in table.teachers + table.students + table.others}
        for network in table.teachers:
            teachers = table.teacher_pair(network)
            students = {name: table.training(name) for name in table.students if name != network}
            directories |= teachers.students(students).keys() | {teachers.directories["nasty"]}
    return directories


def without_data(table: Table) -> Runs:
    """Theft without data: a normal and a nasty ResNet-34, and ResNet-18 students that see no image of the data set."""
    teachers = table.teacher_pair("resnet34")
    training = {"dataset": table.dataset, "model_name": "resnet34", **table.sgd}
    runs = {teachers.directories["normal"]: training, teachers.directories["nasty"]: teachers.nasty(training)}
    for kind, teacher in teachers.directories.items():
        for method in DATA_FREE:
            runs[f"{teachers.place(kind)}/{method}_resnet18"] = {
                "method": method, "dataset": table.dataset, "model_name": "resnet18",
                **teachers.read_by_student(teacher)}
    return runs


def runs() -> Runs:
    same_network: Runs = {}
    for table in TABLES:
        for network in table.teachers:
            same_network |= table.teacher_pair(network).students({network: table.training(network)})
    resnet18 = CIFAR10.teacher_pair("resnet18")
    swept = ablations(resnet18, nasty=resnet18.nasty(CIFAR10.training("resnet18")),
                      students={name: CIFAR10.training(name) for name in ("cnn", "preresnet20")},
                      values={"alpha": [0.1, 0.3, 0.5, 0.7, 1.0], "temperature": [1, 8, 12, 16, 20],
                              "subset_fraction": [0.1, 0.3, 0.5, 0.7, 0.9],
                              "weight": [0, 0.005, 0.01, 0.02, 0.06, 0.08, 0.1]})
    return same_network | without_data(CIFAR10) | without_data(CIFAR100) | swept
