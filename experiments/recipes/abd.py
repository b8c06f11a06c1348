"""Backdoors and ABD on CIFAR-10 and GTSRB: poisoned wide ResNets, and their students with and without data."""
from __future__ import annotations

from dataclasses import dataclass, field

from experiments.recipes.common import Runs, Values, backdoor_defense, reads

TRIGGERS = ("badnet_grid", "badnet_sq", "blend", "cl", "l0_inv", "l2_inv", "sig", "smooth", "trojan_3x3", "trojan_8x8",
            "trojan_wm")
WITH_A_FIFTH_OF_THE_DATA = {"subset_fraction": 0.2, "alpha": 0.95, "temperature": 6, "learning_rate": 0.1,
                            "batch_size": 128, "num_epochs": 170}
# Self-retrospection as in ABD's published code, which defines the divergence differently
REFERENCE = {"zskt": {"sr_start": 0.0, "sr_penalty": 0.01, "sr_batch_norm": "train", "sr_eta": 0.01},
             "ood": {"sr_start": 0.0, "sr_weight": 640, "sr_detach": 0, "sr_batch_norm": "train"}}


@dataclass(frozen=True)
class DataSet:
    """Backdoor target, and training of teachers and students without data, on one data set."""

    folder: str
    name: str
    target: int
    batch_size: int  # of the teachers
    zskt: Values = field(default_factory=dict)  # parameters of ZSKT that differ from the defaults
    defenses: Runs = field(default_factory=lambda: {"auto": {}, "sr": {}, "sv": {}})  # parameters by backdoor defense
    more_methods: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by trigger; every trigger also uses ZSKT


CIFAR10 = DataSet("CIFAR10/abd", "cifar10", target=0, batch_size=128, more_methods={
    "badnet_grid": ("cmi", "ood"), "badnet_sq": ("cmi",), "trojan_wm": ("cmi", "ood")})
GTSRB = DataSet("GTSRB/abd", "gtsrb", target=1, batch_size=256,
                zskt={"temperature": 0.5, "attention_weight": 0, "pseudo_batches": 100, "num_epochs": 100},
                defenses={"auto": {"sr_epochs": 2}, "sr": {"sr_epochs": 2}, "sv": {"sv_batches": 50}})


def teacher(data: DataSet, network: str = "wrn16_2") -> Values:
    return {"dataset": data.name, "model_name": network, "learning_rate": 0.1, "annealing": "cosine",
            "batch_size": data.batch_size, "num_epochs": 200}


def backdoor(data: DataSet, trigger: str, *methods: str, network: str = "wrn16_2", below: str = "") -> Runs:
    """A poisoned teacher, its student with a fifth of the data, and students by each data-free method, without and with
    backdoor defense. below: a directory between those of the data set and the trigger."""
    place = f"{data.folder}/{below}{trigger}"
    poison = {"trigger": trigger, "target": data.target}
    poisoned = {**teacher(data, network), **poison, "poison_rate": 0.1}
    if trigger == "cl":  # its adversarial images need a clean classifier
        poisoned["surrogate_resume"] = f"experiments/{data.folder}/clean/teacher/last_model.tar"
    student = {"dataset": data.name, "model_name": "wrn16_1",
               **reads("teacher", {"model_name": network}, f"{place}/teacher", "last_model.tar"), **poison}
    runs = {f"{place}/teacher": poisoned, f"{place}/kd": {**student, **WITH_A_FIFTH_OF_THE_DATA}}
    for method in methods:
        no_defense = {"method": method, **student, **(data.zskt if method == "zskt" else {})}
        runs[f"{place}/{method}"] = no_defense
        for defense, options in data.defenses.items():
            runs[f"{place}/{method}_{defense}"] = {**no_defense, **backdoor_defense(defense, **options)}
    return runs


def more_defenses(runs: Runs, place: str) -> Runs:
    """Both defenses of ABD at once, and self-retrospection as in ABD's published code."""
    references = {f"{place}/{method}_sr_reference": {**runs[f"{place}/{method}"], **backdoor_defense("sr", **options)}
                  for method, options in REFERENCE.items()}
    return {f"{place}/zskt_sv_sr": {**runs[f"{place}/zskt"], **backdoor_defense("sv+sr")}, **references}


def runs() -> Runs:
    found: Runs = {}
    for data in (CIFAR10, GTSRB):
        found[f"{data.folder}/clean/teacher"] = teacher(data)
        for trigger in TRIGGERS:
            found |= backdoor(data, trigger, "zskt", *data.more_methods.get(trigger, ()))
    for trigger in ("badnet_grid", "trojan_wm"):
        found |= more_defenses(found, f"{CIFAR10.folder}/{trigger}")
        found |= backdoor(CIFAR10, trigger, "zskt", network="wrn40_2", below="wrn40_2/")
    return found
