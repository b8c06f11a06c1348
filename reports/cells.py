"""What runs are in a paper's table: which network, trained how, by which teacher. Several seeds are one cell."""
from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from runs.directories import Run, experiment, is_seed
from runs.graph import absolute
from runs.stages import display_name
from utils.files import sha256
from utils.params import Description
from utils.results import interface_role, is_number

NAMES = {"net": "CNN", "mlp": "MLP", "resnext29": "ResNeXt-29", "shufflenetv2": "ShuffleNetV2",
         "mobilenetv2": "MobileNetV2"}
DEFENSES = {"": "", "sv": "SV", "sr": "SR", "sv+sr": "SV + SR", "auto": "ABD"}
RECIPE = ("num_epochs", "learning_rate", "schedule", "batch_size", "subset_fraction", "augmentation")
PARTS = ("baseline", "abd", "ablations", "attacks", "defenses")  # and kd*: parts of a directory of experiments
CONTINUED = "continued"  # kind of a normal network that starts from the weights of another one of the report
KINDS = ("normal", CONTINUED, "", "poisoned", "student", "unknown")  # in the order of rows; "": trained-in defenses
StudentMethod = tuple[str, ...]  # how a student learns: (), plainly from data; (method,) or (method, backdoor defense)


def network(name: str, channels: int) -> str:
    """A name of the zoo that tells widths of `net` apart: `net`, `net16`."""
    return f"{name}{channels}" if name == "net" and channels != 32 else name


def network_display_name(name: str) -> str:
    """As papers write it: `ResNet-18`."""
    for short, prefix in (("preresnet", "ResNetC-"), ("resnet", "ResNet-"), ("densenet", "DenseNet-"), ("wrn", "WRN-")):
        if name.startswith(short):
            return prefix + name.removeprefix(short).replace("_", "-")
    if name.startswith("net") and name != "net":
        return f"CNN, {name.removeprefix('net')} channels"
    return NAMES.get(name, name)


def student_method_name(method: StudentMethod) -> str:
    """`OoD + SV`: a method and its backdoor defense."""
    return " + ".join([*map(display_name, method[:1]), *(DEFENSES.get(defense, defense) for defense in method[1:])])


def rank(kind: str) -> tuple[int, str]:
    """The order of kinds of networks: normal, protected, poisoned, students."""
    return KINDS.index(kind if kind in KINDS else ""), kind


def kind_of(run: Run, runs: Sequence[Run]) -> str:
    """`normal`, `continued`, a trained-in defense, `poisoned` or `student`. runs: all runs of the report."""
    description = run.params.description
    if description.kind == "normal" and _source(run, runs, "init_from"):
        return CONTINUED
    return description.kind or description.role


@dataclass(frozen=True)
class Cell:
    """All runs of one experiment, one a seed."""

    experiment: Path
    runs: Sequence[Run]
    kind: str = ""  # see `kind_of`
    source: Path | None = None  # of a student: the experiment of its teacher
    origin: Path | None = None  # of a nasty teacher: the experiment of the normal one that it was made from
    teacher_kind: str = ""  # of a student: as `kind`, or `unknown` without a source
    victim: Path | None = None  # of a student: the experiment of the network that is no student at the root of a chain

    @cached_property
    def params(self) -> dict[str, Any]:
        return self.runs[0].params.model_dump()

    @property
    def network(self) -> str:
        return network(self.params["model_name"], self.params["num_channels"])

    @property
    def teacher(self) -> str | None:
        """The network of a student's teacher."""
        return network(self.params["teacher_model"], self.params["teacher_num_channels"]) \
            if self.kind == "student" else None

    @property
    def description(self) -> Description:
        return self.runs[0].params.description

    @property
    def student_method(self) -> StudentMethod:
        """How a student learns."""
        method, defense = self.description.method, self.description.backdoor_defense
        return () if self.description.plain else (method,) if defense == "none" else (method, defense)

    @property
    def answers(self) -> str:
        """What a student's teacher lets out; empty for its logits."""
        return self.description.answers

    @property
    def backdoor(self) -> str | None:
        """The trigger of a poisoned teacher, or of a student of one."""
        return self.params.get("trigger") if "poisoned" in (self.kind, self.teacher_kind) else None

    @property
    def ablation(self) -> bool:
        """Whether it is there for a figure and not for a table: a run below a directory `ablations`."""
        return _parts(self.experiment)[1] == "ablations"

    @property
    def subset(self) -> int | None:
        """The number of images that a network is trained on, of a student those that are sent to its teacher; None for
        all of them, or a fraction."""
        counts = [count for count in (self.description.budget, self.params.get("subset_size")) if count]
        return min(counts, default=None)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def values(self, epoch: str, key: str = "test_accuracy") -> dict[int, float]:
        """Of the finished runs at their `best` or their `last` epoch, by seed."""
        rows = {run.params.seed: getattr(run.results, epoch) for run in self.finished}
        return {seed: row[key] for seed, row in rows.items() if is_number(row.get(key))}


class DeployedTeacher(Cell):
    """The teacher of a cell's students as a client meets it: behind its interface and answer defense."""

    @classmethod
    def of(cls, students: Cell) -> DeployedTeacher:
        return cls(**{each.name: getattr(students, each.name) for each in fields(students)})

    def values(self, epoch: str, key: str = "test_accuracy") -> dict[int, float]:
        """As the students evaluated it before they were trained, by seed; the same at either epoch. Answers that depend
        on the order of the queries are not evaluated in batches: their accuracy is that of the profile of answers."""
        found = {}
        for run, results in ((run, run.results) for run in self.finished):
            if results is None:
                continue
            value = results.evaluated_before.get(interface_role("teacher", self.answers), {}).get(key)
            profile = results.details.get("answers")
            if value is None and key == "test_accuracy" and isinstance(profile, dict):
                value = profile.get("accuracy")
            if is_number(value):
                found[run.params.seed] = value
        return found


@dataclass(frozen=True)
class Collection:
    """The cells of one data set that are compared with each other."""

    name: str  # for files
    title: str
    dataset: str
    cells: Sequence[Cell]


def mean_std(values: Iterable[float], sign: str = "", digits: int = 2) -> str:
    """`mean`, or `mean ± standard deviation` of several."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def cells(runs: Sequence[Run]) -> tuple[list[Cell], list[str]]:
    """Runs by experiment, and remarks: on runs that lie where a seed would but are of another recipe than the others,
    or of a seed that is there already, which are left out; on what deserves a doubt."""
    groups: dict[Path, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (is_seed(run.directory), run.directory)):
        groups.setdefault(run.experiment, []).append(run)
    found, warnings = [], []
    for place, members in groups.items():
        kept, seed_warnings = _seeds(members)
        warnings += [*seed_warnings, *(text for run in kept for text in _warnings(run, runs))]
        source, origin = (_source(members[0], runs, key) for key in ("teacher_resume", "adversarial_resume"))
        victim = source
        while victim and victim.params.description.role == "student" and (further := _source(victim, runs)):
            victim = further
        named = members[0].params.checkpoints().get("teacher_resume")
        taught_by = source.experiment if source else experiment(Path(named).parent) if named else None
        teacher_kind = kind_of(source, runs) if source else "unknown"
        found.append(Cell(place, kept, kind_of(members[0], runs), taught_by, origin.experiment if origin else None,
                          teacher_kind if named else "", victim.experiment if victim else taught_by))
    return sorted(found, key=lambda cell: cell.experiment), warnings


def _seeds(members: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs of an experiment that have the recipe of the first, one for each seed, and a remark on each other."""
    first, kept, warnings = members[0], {members[0].params.seed: members[0]}, []
    recipe = _recipe(first)
    for run in members[1:]:
        differs = [key for key, value in _recipe(run).items() if recipe.get(key) != value]
        if run.params.script != first.params.script:
            differs = ["the stage"]
        if differs:
            warnings.append(f"{run.directory}: left out, it differs from {first.directory} in {', '.join(differs)}")
        elif run.params.seed in kept:
            warnings.append(f"{run.directory}: left out, it has the seed of {kept[run.params.seed].directory}")
        else:
            kept[run.params.seed] = run
    return list(kept.values()), warnings


def _warnings(run: Run, runs: Sequence[Run]) -> list[str]:
    """What may make a run another than it seems: its teacher's seed, parameters or checkpoints that changed since."""
    warnings = []
    teacher = _source(run, runs)
    if teacher and teacher.params.seed != run.params.seed and any(
            other.experiment == teacher.experiment and other.params.seed == run.params.seed for other in runs):
        warnings.append(f"its teacher is {teacher.directory}, of another seed than its own")
    if run.stale:
        warnings.append(f"params.json was changed since it was run ({', '.join(run.stale)}); shown as run")
    warnings += [f"{path} is by now another than the one that it read" for path in _replaced(run)]
    return [f"{run.directory}: {text}" for text in warnings]


def _replaced(run: Run) -> list[str]:
    """The checkpoints that a finished run has read, as far as there is something else in their place."""
    replaced = []
    for read in run.results.checkpoints_read.values() if run.results else ():
        file = Path(read["path"]) if isinstance(read, dict) and isinstance(read.get("path"), str) else None
        with contextlib.suppress(OSError):  # somebody else's, for example
            if file and file.stat().st_mtime > (run.directory / "results.json").stat().st_mtime and \
                    sha256(file) != read.get("sha256"):
                replaced.append(str(file))
    return list(dict.fromkeys(replaced))  # one that was read in two roles


def _recipe(run: Run) -> dict[str, Any]:
    """What the seeds of an experiment have in common: parameters, checkpoints by the experiment that they are of."""
    left_out = {"seed", *run.params.changeable} - {"num_epochs"}
    sources = {key: experiment(Path(name).parent) for key, name in run.params.checkpoints().items()}
    return {key: value for key, value in run.params.model_dump().items() if key not in left_out} | sources


def _source(run: Run, runs: Sequence[Run], key: str = "teacher_resume") -> Run | None:
    """The run whose checkpoint a run read, if it is among these. Directories may have been moved or copied together:
    it is the nearest of those that the path could mean."""
    path = Path(run.params.checkpoints().get(key, "")).parent
    if not path.name:
        return None
    like = [other for other in runs if absolute(other.directory) == absolute(path)
            or absolute(other.directory).parts[-len(path.parts):] == path.parts]
    return max(like, default=None, key=lambda other: (shared(run.directory, other.directory),
                                                      absolute(other.directory) == absolute(path)))


def shared(one: Path, other: Path) -> int:
    """How many directories two paths have in common."""
    return len(Path(os.path.commonpath([absolute(one), absolute(other)])).parts)


def baseline_score(cell: Cell, others: Sequence[Cell]) -> tuple[int, int, bool, bool]:
    """Which of several networks from labels is the one to compare others with: the one that has most directories in
    common with them, most of their recipe, that lies among baselines, that is a teacher of theirs."""
    common = max((shared(cell.experiment, other.experiment) for other in others), default=0)
    recipe = max((sum(cell.params.get(key) == other.params.get(key) for key in RECIPE) for other in others
                  if other.network == cell.network), default=0)
    return (common, recipe, "baseline" in cell.experiment.parts,
            any(other.source == cell.experiment for other in others))


def collections(cells: Sequence[Cell]) -> list[Collection]:
    """What lies in one directory that holds `baseline`, `kd*`, `abd`, `ablations`; where there is nothing of the kind,
    what lies side by side."""
    from utils.datasets import DATASETS  # with torch, of which a report without runs has no need

    groups: dict[tuple[str, Path], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.params["dataset"], _parts(cell.experiment)[0]), []).append(cell)
    found = []
    for (dataset, root), members in groups.items():
        words = DATASETS.entry(dataset).display_name if dataset in DATASETS else dataset
        is_only = sum(other == dataset for other, _ in groups) == 1
        found.append(Collection(dataset, words, dataset, members) if is_only else
                     Collection(f"{dataset} {root}", f"{words}, {root}", dataset, members))
    return found


def _parts(place: Path) -> tuple[Path, str]:
    """The directory of a collection, and the part of it in which an experiment lies."""
    parts = place.parent.parts
    marks = [at for at, part in enumerate(parts) if part in PARTS or part == "kd" or part.startswith("kd_")]
    return (Path(*parts[:marks[-1]]), parts[marks[-1]]) if marks else (place.parent, "")
