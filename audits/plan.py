"""Grid of an audit: the attacks, each a run of train_kd.py or train_datafree.py, and the students to compare with.

A student NET on IMAGES (`all` or a number) has these directories below DIR/runs, each with runs in ATTACK/seedN:
- `NET/IMAGES/alone`: without a teacher;
- `NET/IMAGES/controls`: attacks on answers that do not depend on the image;
- `NET/IMAGES/THIEF/ANSWERS`: attacks on the audited model;
- `NET/IMAGES/THIEF/unprotected`: attacks on the unprotected model.
"""
from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attacks import REGISTRY
from attacks.params import AttackParams
from runs.audits import LABELED, NO_DATA, OF_MODEL, UNLABELED, AuditParams
from runs.stages import DATAFREE, KD, SCRATCH
from utils.errors import UserError
from utils.files import read_json, write_text
from utils.params import Params as RunParams
from utils.params import Stage, changed_keys, check_params

SMOOTHING = (0.1, 0.3)  # of students without a teacher: the best strengths on the demo
MAX_EPOCH_FACTOR = 5  # maximum factor of the epochs of students of fewer images
MIN_STEPS = 8  # per epoch

Specification = dict[str, Any]  # an attack and its parameters
# The strongest attacks on the demo's teachers among those that cost no more than plain training, and attacks made
# against protected teachers.
CORE: tuple[Specification, ...] = (
    {"attack": "kd", "temperature": 1}, {"attack": "kd", "temperature": 4}, {"attack": "kd", "temperature": 20},
    {"attack": "hard_label"}, {"attack": "dist"}, {"attack": "htc"}, {"attack": "averager"},
    {"attack": "logit_standardization"})
CONTROLS = ("uniform", "class_mean")
# Not attacks of a single run: a control needs an attack, a chain needs several students.
NOT_STANDALONE = (*CONTROLS, "scm_chain")
NO_DATA_METHODS: tuple[Specification, ...] = (
    {"method": "ood", "patch_kinds": ["colour", "grey", "blob"], "balance": 1, "temperature": 4,
     "annealing": "cosine"},)
FULL_INTERFACES = ("logits", "top_k:3", "round:1", "label")


@dataclass(frozen=True)
class Attempt:
    """Experiment with one run per seed: one thief's attack on one model, or a student without a teacher."""

    student: str  # network, as in directory names
    images: int | None  # number of images that the student learns from; None: all
    count: int  # number of training images, never None; without data, number of patches
    thief: str
    victim: str  # "model", "unprotected", "control", or "none" for a student of labels
    answers: str  # what a client gets; see `answers_display_name`
    attack: str  # display name
    directory: Path
    values: dict[str, Any] = field(compare=False)  # params.json without the seed
    stage: Stage = field(compare=False)
    answer_defense: str = "none"
    top_class_only: bool = False

    def params(self) -> RunParams:
        """Validated parameters. Raises UserError if they do not fit together."""
        return check_params(self.values, self.directory, self.stage, {})

    def run_directory(self, seed: int) -> Path:
        return self.directory / f"seed{seed}"

    def check(self, seed: int) -> None:
        """Raise UserError if the directory of a seed has a params.json with other parameters."""
        file = self.run_directory(seed) / "params.json"
        if not file.exists():
            return
        there, now = (check_params(each, file, self.stage, {}) for each in (read_json(file), self._seeded(seed)))
        changed = changed_keys(there.model_dump(), now)
        if there.num_epochs != now.num_epochs and "num_epochs" in now.changeable:  # which a run itself may change
            changed.append(f"num_epochs ({there.num_epochs} -> {now.num_epochs})")
        if changed:
            raise UserError(f"{file} is of an earlier audit with other parameters, {', '.join(changed)}: choose "
                            "another directory, or delete its runs with --restart")

    def write(self, seed: int) -> None:
        """Write the params.json of a seed, unless it exists."""
        file = self.run_directory(seed) / "params.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(self._seeded(seed), indent=1) + "\n")

    def _seeded(self, seed: int) -> dict[str, Any]:
        return {**self.values, "seed": seed}


@dataclass(frozen=True)
class Plan:
    """All attempts of an audit, and the attacks that are not tried, with the reason."""

    attempts: list[Attempt]
    not_tried: dict[str, str]
    seeds: list[int]

    @classmethod
    def joined(cls, plans: Sequence[Plan]) -> Plan:
        """Join plans; `not_tried` and `seeds` are those of the first."""
        return cls([attempt for each in plans for attempt in each.attempts], plans[0].not_tried, plans[0].seeds)

    def as_unprotected(self) -> Plan:
        """Plan for the unprotected model, to be joined with the plan for the protected model."""
        return replace(self, attempts=[replace(attempt, victim="unprotected") if attempt.victim == "model" else attempt
                                       for attempt in self.attempts])

    def check(self) -> None:
        """Raise UserError if a directory of the grid has a run with other parameters."""
        for attempt in self.attempts:
            for seed in self.seeds:
                attempt.check(seed)

    def write(self) -> None:
        """Write every params.json that does not exist."""
        for attempt in self.attempts:
            for seed in self.seeds:
                attempt.write(seed)

    def directories(self) -> list[Path]:
        return [attempt.run_directory(seed) for attempt in self.attempts for seed in self.seeds]


def plan(params: AuditParams, directory: Path, sizes: Mapping[str, int], references: Path | None = None) -> Plan:
    """Build the grid of an audit.

    sizes: number of training images of `dataset` and of each foreign data set. references: directory of the audit of
    the unprotected model, if it trains the attacks on that model and the students without a teacher.

    Raises UserError if a thief, interface or attack is unknown, or if a requested attack fits no thief and interface.
    """
    grid = _Grid(params, directory, sizes)
    attempts = list(grid.attempts(references))
    if not any(attempt.victim == "model" for attempt in attempts):
        raise UserError(f"{directory / 'params.json'}: the grid is empty: no attack fits the thieves and interfaces "
                        f"({'; '.join(f'{name}: {why}' for name, why in grid.refused.items())})")
    places = [attempt.directory for attempt in attempts]
    if twice := [place for at, place in enumerate(places) if place in places[:at]]:
        raise UserError(f"{directory / 'params.json'}: two students of the grid have the directory {twice[0]}: an "
                        "attack, interface, thief or network is given twice; remove one")
    tried = {attempt.values["attack"] for attempt in attempts if attempt.victim == "model" and "attack" in
             attempt.values}
    tried_labels = {attempt.attack for attempt in attempts if attempt.victim == "model"}
    asked = _specifications(params) if params.attacks else []
    if never_used := [each["attack"] for each in asked if attack_display_name(each) not in tried_labels]:
        raise UserError(f'{directory / "params.json"}: "attacks": {never_used[0]} fits no thief and interface of this '
                        f"audit: {grid.refused.get(never_used[0], 'a thief without images cannot use it')}")
    not_tried = {name: grid.refused.get(name, "not asked for") for name in REGISTRY
                 if name not in tried and name not in CONTROLS}
    return Plan(attempts, not_tried, list(params.seeds))


@dataclass
class _Grid:
    params: AuditParams
    directory: Path
    sizes: Mapping[str, int]
    refused: dict[str, str] = field(default_factory=dict)  # attacks that do not fit somewhere, and the reason

    def attempts(self, references: Path | None) -> Iterator[Attempt]:
        params = self.params
        thieves = list(params.thieves or (LABELED, UNLABELED, *([NO_DATA] if params.preset == "full" else [])))
        offered = [(interface, defense) for interface in interfaces(params) for defense in params.answer_defenses]
        if not params.unprotected and not {("logits", "none"), ("probabilities", "none")} & {*offered}:
            offered.insert(0, ("logits", "none"))  # reference of the other answers
        victims = {"model": offered}
        if params.unprotected and references is None:
            victims["unprotected"] = [("logits", "none")]
        for student in params.networks:
            for images in params.query_budgets:
                if references is None:
                    yield from self._no_teacher_students(student, images)
                    if LABELED in thieves:
                        yield from self._control_students(student, images)
                for victim, answers in victims.items():
                    for interface, defense in answers:
                        for thief in thieves:
                            if thief != NO_DATA:
                                yield from self._attack_students(student, images, thief, victim, interface, defense)
                            elif images == params.query_budgets[0]:  # patches do not count as images
                                yield from self._data_free_students(student, victim, interface, defense)

    def _no_teacher_students(self, student: Mapping[str, Any], images: int | None) -> Iterator[Attempt]:
        for smoothing in (0, *SMOOTHING):
            values = self._training_params(student, images, self.params.dataset)
            values |= {"subset_size": images} if images else {}
            label = f"label smoothing {smoothing:g}" if smoothing else "labels"
            yield self._attempt(student, images, LABELED, "none", "", label, f"alone/{slug(label)}",
                                values | ({"label_smoothing": smoothing} if smoothing else {}), SCRATCH)

    def _control_students(self, student: Mapping[str, Any], images: int | None) -> Iterator[Attempt]:
        """Each attack that reads labels, on uniform answers or, if it reads the top class, on class means."""
        for specification in _specifications(self.params):
            labeled = {**specification, **_alpha_for(specification, LABELED)}
            attack = _attack_params(labeled)
            if attack is None or not attack.reads_labels:
                continue
            name = specification["attack"]
            control = "class_mean" if attack.reads_top_class else "uniform"
            own = {key: value for key, value in labeled.items() if key != "attack"}
            label = attack_display_name(specification)
            values = {**self._student_params(student, images, LABELED, "model", "logits", "none"), "attack": control,
                      "of": name, "of_parameters": own}
            attempt = self._attempt(student, images, LABELED, "control", control, label, f"controls/{slug(label)}",
                                    values, KD)
            if fitting := self._fits(attempt, name):
                yield fitting

    def _attack_students(self, student: Mapping[str, Any], images: int | None, thief: str, victim: str, interface: str,
                 defense: str) -> Iterator[Attempt]:
        place = _victim_directory(victim, interface, defense)
        for specification in _specifications(self.params, defended=defense != "none"):
            label = attack_display_name(specification)
            values = {**self._student_params(student, images, thief, victim, interface, defense), **specification,
                      **_alpha_for(specification, thief)}
            attempt = self._attempt(student, images, thief, victim, answers_display_name(interface, defense), label,
                                    f"{slug(thief)}/{place}/{slug(label)}", values, KD)
            if fitting := self._fits(attempt, specification["attack"]):
                yield fitting

    def _data_free_students(self, student: Mapping[str, Any], victim: str, interface: str,
                      defense: str) -> Iterator[Attempt]:
        count = self.sizes[self.params.dataset]
        for specification in NO_DATA_METHODS:
            base = self._student_params(student, None, NO_DATA, victim, interface, defense)
            kind = DATAFREE.params_by(specification["method"])
            values = {key: value for key, value in base.items() if key in kind.model_fields and key != "schedule"}
            values |= {**specification, "patches": count}
            label = DATAFREE.display_name(specification["method"])
            attempt = self._attempt(student, None, NO_DATA, victim, answers_display_name(interface, defense), label,
                                    f"{NO_DATA}/{_victim_directory(victim, interface, defense)}/{slug(label)}", values,
                                    DATAFREE)
            if fitting := self._fits(attempt, specification["method"]):
                yield fitting

    def _attempt(self, student: Mapping[str, Any], images: int | None, thief: str, victim: str, answers: str,
                 attack: str, place: str, values: dict[str, Any], stage: Stage) -> Attempt:
        network = network_name(student)
        directory = self.directory / "runs" / network / str(images or "all") / place
        count = values.get("patches") or images or self.sizes[str(values.get("transfer_set") or self.params.dataset)]
        return Attempt(network, images, count, thief, victim, answers, attack, directory, values, stage)

    def _fits(self, attempt: Attempt, name: str) -> Attempt | None:
        """The attempt, completed from its parameters; None, with a reason in `refused`, if they do not fit."""
        try:
            description = attempt.params().description
        except UserError as error:
            self.refused[name] = str(error).removeprefix(f"{attempt.directory}: ")
            return None
        return replace(attempt, top_class_only=description.top_class_only,
                       answer_defense=description.answer_defense)

    def _student_params(self, student: Mapping[str, Any], images: int | None, thief: str, victim: str, interface: str,
                 defense: str) -> dict[str, Any]:
        """Parameters of a student of the audited or unprotected model, without those of the attack."""
        params = self.params
        foreign = thief if thief not in (LABELED, UNLABELED, NO_DATA) else None
        values = self._training_params(student, images, foreign or params.dataset)
        checkpoint = str(params.unprotected) if victim == "unprotected" else params.checkpoint
        values |= {"teacher_model": params.model_name, "teacher_resume": weights(checkpoint), "queries": "once",
                   "teacher_cache": True}
        if params.model_name == "net":
            values["teacher_num_channels"] = params.num_channels
        if params.model_options:
            values["teacher_model_options"] = params.model_options
        values |= {"query_budget": images} if images else {}
        values |= {"transfer_set": foreign} if foreign else {} if thief == LABELED else {"labels": False}
        return values | {key: value for key, value in (("interface", interface), ("answer_defense", defense))
                         if value not in ("logits", "none")}

    def _training_params(self, student: Mapping[str, Any], images: int | None, dataset: str) -> dict[str, Any]:
        values = {**self.params.training, **student}
        count = self.sizes[dataset]
        if images is None:
            return values
        if images > count:
            raise UserError(f'{self.directory / "params.json"}: "query_budgets" has {images}, but {dataset} has '
                            f"{count} training images")
        longer = max(1.0, min(count / images, MAX_EPOCH_FACTOR))
        return values | {"num_epochs": round(self.params.num_epochs * longer),
                         "schedule": [round(epoch * longer) for epoch in self.params.schedule],
                         "batch_size": min(self.params.batch_size, max(2, images // MIN_STEPS))}


def _specifications(params: AuditParams, *, defended: bool = False) -> list[Specification]:
    """Attacks to try, always including hard labels. defended: whether a defense changes the answers."""
    if params.attacks is not None:
        found = [{"attack": each} if isinstance(each, str) else dict(each) for each in params.attacks]
        for each in found:
            _check_attack(each)
    elif params.preset == "core":
        found = list(CORE)
    else:
        named = {specification["attack"] for specification in CORE}
        found = [*CORE, *({"attack": "kd", "temperature": temperature} for temperature in (2, 10)),
                 {"attack": "skeptical", "delay": 0},  # the published delay exceeds many runs
                 *({"attack": name} for name in REGISTRY if name not in {*named, *NOT_STANDALONE, "skeptical"}
                   and not _needs_all_answers(name))]
    if params.attacks is None and defended:
        found += [{"attack": name} for name in REGISTRY if _needs_all_answers(name)
                  and (params.preset == "full" or name == "bayes")]
    hard_label = {"attack": "hard_label"}
    return found if hard_label in found else [*found, hard_label]


def _check_attack(specification: Specification) -> None:
    name = specification.get("attack")
    try:
        if not isinstance(name, str):
            raise ValueError(f"{specification} has no \"attack\"")
        REGISTRY.entry(name)
        if name in CONTROLS:
            raise ValueError(f'"{name}" is a control, which every attack that reads labels gets: remove it')
    except ValueError as error:
        raise UserError(f'"attacks": {error}') from None


def _needs_all_answers(name: str) -> bool:
    params = _attack_params({"attack": name}) if name not in NOT_STANDALONE else None
    return params is not None and params.needs_all_answers


def _alpha_for(specification: Specification, thief: str) -> dict[str, Any]:
    """Weight of the teacher's term: 1 without labels; 0.5 for hard labels beside labels; otherwise the default."""
    attack = _attack_params(specification)
    if attack is None or "alpha" not in type(attack).model_fields:
        return {}
    if thief != LABELED:  # an unsuitable alpha of the user is refused later, not replaced
        return {"alpha": 1} if attack.needs_labels and "alpha" not in specification else {}
    return {"alpha": 0.5} if attack.top_class_only and "alpha" not in specification else {}


def _attack_params(specification: Specification) -> AttackParams | None:
    """Parameters of an attack; None if they are invalid, which the check of its run reports."""
    try:
        return REGISTRY[specification["attack"]].Params(**{key: value for key, value in specification.items()
                                                          if key != "attack"})
    except ValueError:
        return None


def interfaces(params: AuditParams) -> Sequence[str]:
    """Interfaces to attack."""
    return params.interfaces or (FULL_INTERFACES if params.preset == "full" else FULL_INTERFACES[:1])


def attack_display_name(specification: Specification) -> str:
    """Display name of an attack and the parameters given: `KD, temperature 4`."""
    own = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
           for key, value in specification.items() if key != "attack"]
    return ", ".join([REGISTRY.entry(specification["attack"]).display_name, *own])


def answers_display_name(interface: str, answer_defense: str) -> str:
    """Display name of the answers that a client gets: `logits`, `label`, `mad:0.5`, `label after mad:0.5`."""
    if answer_defense == "none":
        return interface
    return answer_defense if interface in ("logits", "probabilities") else f"{interface} after {answer_defense}"


def network_name(student: Mapping[str, Any]) -> str:
    """Name of a network in directories and tables: `net16`, `resnet18`, `torchvision_resnet18`, with a hash of its
    options, if any."""
    name, options = str(student["model_name"]), student.get("model_options")
    label = f"net{student.get('num_channels', 32)}" if name == "net" else slug(name)
    return label + f"_{zlib.crc32(json.dumps(options, sort_keys=True).encode()):08x}" * bool(options)


def _victim_directory(victim: str, interface: str, defense: str) -> str:
    return "unprotected" if victim == "unprotected" else slug(answers_display_name(interface, defense))


def slug(label: str) -> str:
    """Convert a label into a directory name."""
    return re.sub(r"[^a-z0-9_.]+", "_", label.lower()).strip("_.")


def weights(checkpoint: str) -> str:
    """File that a run reads as its teacher: the last checkpoint of a run directory, or the given file."""
    return str(Path(checkpoint) / "last_model.tar") if Path(checkpoint).is_dir() else checkpoint


def same_grid(params: AuditParams, other: AuditParams) -> Sequence[str]:
    """Keys that must be equal for the students of two audits to be comparable, but differ."""
    one, two = ({key: value for key, value in each.model_dump().items() if key not in OF_MODEL}
                | {"students": each.networks} for each in (params, other))
    return [key for key in one if one[key] != two[key]]
