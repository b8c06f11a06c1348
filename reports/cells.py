"""Cells of a paper's tables: experiments with their network, training and teacher. All seeds are one cell."""
from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from reports.sources import CONTINUED, Sources, kind_of, shared, starts_from_run
from runs.directories import Run, experiment, is_audit, is_seed
from runs.stages import display_name
from utils.files import sha256
from utils.params import Description
from utils.results import interface_role, is_number

NAMES = {"net": "CNN", "mlp": "MLP", "resnext29": "ResNeXt-29", "shufflenetv2": "ShuffleNetV2",
         "mobilenetv2": "MobileNetV2"}
DEFENSES = {"none": "no defense", "sv": "SV", "sr": "SR", "sv+sr": "SV + SR", "auto": "ABD",
            "auto_fallback": "searched SV"}  # `auto` with `sv_fallback`, which is not ABD as published
RECIPE = ("num_epochs", "learning_rate", "schedule", "batch_size", "subset_fraction", "augmentation")
PARTS = ("baseline", "abd", "ablations", "attacks", "defenses", "triggers")  # and kd*: subdirectories of a collection
KINDS = ("normal", CONTINUED, "", "poisoned", "student", "unknown")  # row order; "": trained-in defenses
# (): plain distillation with data; (method,); or (method, backdoor defense, ...), one defense for each training that
# continued the student.
StudentMethod = tuple[str, ...]


def network(name: str, channels: int) -> str:
    """Network name with the width of `net` if it is not the default: `net`, `net16`."""
    return f"{name}{channels}" if name == "net" and channels != 32 else name


def network_display_name(name: str) -> str:
    """Network name as in papers: `ResNet-18`."""
    for short, prefix in (("preresnet", "ResNetC-"), ("resnet", "ResNet-"), ("densenet", "DenseNet-"), ("wrn", "WRN-")):
        if name.startswith(short):
            return prefix + name.removeprefix(short).replace("_", "-")
    if name.startswith("net") and name != "net":
        return f"CNN, {name.removeprefix('net')} channels"
    return NAMES.get(name, name)


def student_method_name(method: StudentMethod) -> str:
    """Display name of a method and its backdoor defenses: `OoD + SV`; `OoD, then SR` for a continued student."""
    start = [display_name(name) for name in method[:1]] + [DEFENSES[name] for name in method[1:2] if name != "none"]
    return ", then ".join([" + ".join(start), *(DEFENSES[name] for name in method[2:])])


def rank(kind: str) -> tuple[int, str]:
    """Sort key of network kinds: normal, protected, poisoned, students."""
    return KINDS.index(kind if kind in KINDS else ""), kind


def is_defense(kind: str) -> bool:
    """True for networks with a trained-in defense."""
    return kind not in (*KINDS, "smoothed")


def kind_display_name(kind: str) -> str:
    """Display name of a kind of network: `CMIM`, `continued training`."""
    return "continued training" if kind == CONTINUED else display_name(kind)


@dataclass(frozen=True)
class Cell:
    """All runs of one experiment, one per seed."""

    experiment: Path
    runs: Sequence[Run]
    kind: str = ""  # see `kind_of`
    source: Path | None = None  # students: experiment of the teacher
    origin: Path | None = None  # nasty teachers: experiment of the normal teacher that it was made from
    teacher_kind: str = ""  # students: `kind` of the teacher, or `unknown` without a source
    victim: Path | None = None  # students: experiment at the root of a chain of teachers
    earlier: StudentMethod = ()  # students without data: backdoor defenses of the trainings that this one continues

    @cached_property
    def params(self) -> dict[str, Any]:
        return self.runs[0].params.model_dump()

    @property
    def network(self) -> str:
        return network(self.params["model_name"], self.params["num_channels"])

    @property
    def teacher(self) -> str | None:
        """Network of a student's teacher; None for other kinds."""
        return network(self.params["teacher_model"], self.params["teacher_num_channels"]) \
            if self.kind == "student" else None

    @cached_property
    def description(self) -> Description:
        return self.runs[0].params.description

    @property
    def strength(self) -> float | None:
        """Strength of a trained-in defense; None without one."""
        value = dict(self.description.settings).get(self.description.strength)
        return float(value) if is_number(value) else None

    @property
    def student_method(self) -> StudentMethod:
        if self.description.plain:
            return ()
        defenses = *self.earlier, _defense(self.runs[0])
        return (self.description.method,) if defenses == ("none",) else (self.description.method, *defenses)

    @property
    def answers(self) -> str:
        """Answers of a student's teacher; empty for logits."""
        return self.description.answers

    @property
    def backdoor(self) -> str | None:
        """Trigger of a poisoned teacher, or of a student of one."""
        return self.params.get("trigger") if "poisoned" in (self.kind, self.teacher_kind) else None

    @property
    def ablation(self) -> bool:
        """True if the experiment is below a directory `ablations`: shown in figures, not in tables."""
        return self._place[1] == "ablations"

    @cached_property
    def _place(self) -> tuple[Path, str]:
        """Directory of the collection, and the subdirectory that contains the experiment."""
        parts = self.experiment.parent.parts
        for at in (at for at, part in enumerate(parts) if part == "runs"):
            if is_audit(Path(*parts[:at], "params.json")):
                return Path(*parts[:at]), "runs"
        marks = [at for at, part in enumerate(parts) if part in PARTS or part == "kd" or part.startswith("kd_")]
        return (Path(*parts[:marks[-1]]), parts[marks[-1]]) if marks else (self.experiment.parent, "")

    @property
    def subset(self) -> int | None:
        """Number of training images or, for a student, of images sent to its teacher; None for all or a fraction."""
        counts = [count for count in (self.description.budget, self.params.get("subset_size")) if count]
        return min(counts, default=None)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def values(self, source: str, key: str = "test_accuracy") -> dict[int, float]:
        """Metric of the finished runs by seed, at their `best` or `last` epoch or in an entry of their details."""
        found = {run.params.seed: run.results for run in self.finished if run.results}
        rows = {seed: getattr(results, source) if source in ("best", "last") else results.details.get(source)
                for seed, results in found.items()}
        return {seed: row[key] for seed, row in rows.items() if isinstance(row, dict) and is_number(row.get(key))}


class DeployedTeacher(Cell):
    """Teacher of a cell's students, behind its interface and answer defense."""

    @classmethod
    def of(cls, students: Cell) -> DeployedTeacher:
        return cls(**{each.name: getattr(students, each.name) for each in fields(students)})

    def values(self, source: str, key: str = "test_accuracy") -> dict[int, float]:
        """Metric that the students logged before training, by seed; the same for both epochs. Answers that depend on
        the order of queries are not evaluated in batches; their accuracy comes from the profile of answers."""
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
    """Cells of one data set that are compared with each other."""

    name: str  # for files
    title: str
    dataset: str
    cells: Sequence[Cell]


def has_started(cell: Cell) -> bool:
    """True if a run has finished an epoch."""
    return any(run.history or run.finished for run in cell.runs)


def mean_std(values: Iterable[float], sign: str = "", digits: int = 2) -> str:
    """`mean`, or `mean ± standard deviation` of several values."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def cells(runs: Sequence[Run]) -> tuple[list[Cell], list[str]]:
    """Group runs by experiment. Returns the cells and warnings, about seed directories that are left out (another
    recipe, or a seed that exists already) and about runs whose inputs have changed."""
    sources, groups = Sources(runs), dict[Path, list[Run]]()
    for run in sorted(runs, key=lambda run: (is_seed(run.directory), run.directory)):
        groups.setdefault(run.experiment, []).append(run)
    found, warnings = [], []
    for place, members in groups.items():
        kept, seed_warnings = _seeds(members)
        warnings += [*seed_warnings, *(text for run in kept for text in _warnings(run, sources))]
        chain, origin = sources.chain(members[0], "teacher_resume"), sources.of(members[0], "adversarial_resume")
        source = chain[0] if chain else None
        named = members[0].params.checkpoints().get("teacher_resume")
        taught_by = source.experiment if source else experiment(Path(named).parent) if named else None
        teacher_kind = kind_of(source, sources) if source else "unknown"
        found.append(Cell(place, kept, kind_of(members[0], sources), taught_by, origin.experiment if origin else None,
                          teacher_kind if named else "", chain[-1].experiment if chain else taught_by,
                          _earlier_defenses(members[0], sources)))
    return sorted(found, key=lambda cell: cell.experiment), warnings


def _defense(run: Run) -> str:
    """Backdoor defense of a student, a key of `DEFENSES`."""
    defense = run.params.description.backdoor_defense
    return f"{defense}_fallback" if defense == "auto" and getattr(run.params, "sv_fallback", False) else defense


def _earlier_defenses(run: Run, sources: Sources) -> StudentMethod:
    """Backdoor defenses of the students without data that a student continues, from the first one."""
    if run.params.description.role != "student" or run.params.description.uses_data:
        return ()
    return tuple(_defense(start) for start in reversed(sources.chain(run, "init_from"))
                 if start.params.description.role == "student")


def _seeds(members: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs of an experiment with the recipe of the first run, one per seed, and a warning about each other run."""
    first, kept, warnings = members[0], {members[0].params.seed: members[0]}, []
    recipe = _recipe(first)
    for run in members[1:]:
        same_arithmetic = run.results and first.results and run.results.precision == first.results.precision
        differs = [key for key, value in _recipe(run).items() if recipe.get(key) != value
                   and not (key == "precision" and same_arithmetic)]  # `auto` may have chosen what the other run sets
        if run.params.script != first.params.script:
            differs = ["the stage"]
        if differs:
            warnings.append(f"{run.directory}: left out, it differs from {first.directory} in {', '.join(differs)}")
        elif run.params.seed in kept:
            warnings.append(f"{run.directory}: left out, it has the seed of {kept[run.params.seed].directory}")
        else:
            kept[run.params.seed] = run
    return list(kept.values()), warnings


def _warnings(run: Run, sources: Sources) -> list[str]:
    """Warnings about a run: its teacher has another seed, or parameters or checkpoints have changed since."""
    warnings = []
    teacher = sources.of(run)
    if teacher and teacher.params.seed != run.params.seed and any(
            other.experiment == teacher.experiment and other.params.seed == run.params.seed for other in sources.runs):
        warnings.append(f"its teacher is {teacher.directory}, of another seed than its own")
    if run.params.description.kind == "normal" and starts_from_run(run) and not sources.of(run, "init_from"):
        warnings.append(f"it starts from {run.params.checkpoints()['init_from']}, whose run is not in this report, so "
                        "it does not count as a normal network")
    if run.stale:
        warnings.append(f"params.json was changed since it was run ({', '.join(run.stale)}); shown as run")
    warnings += [f"{path} has changed since this run read it" for path in _replaced(run)]
    return [f"{run.directory}: {text}" for text in warnings]


def _replaced(run: Run) -> list[str]:
    """Checkpoints that have been replaced since a finished run read them."""
    replaced = []
    for read in run.results.checkpoints_read.values() if run.results else ():
        file = Path(read["path"]) if isinstance(read, dict) and isinstance(read.get("path"), str) else None
        with contextlib.suppress(OSError):  # for example, no permission
            if file and file.stat().st_mtime > (run.directory / "results.json").stat().st_mtime and \
                    sha256(file) != read.get("sha256"):
                replaced.append(str(file))
    return list(dict.fromkeys(replaced))  # a checkpoint may be read in two roles


def _recipe(run: Run) -> dict[str, Any]:
    """Parameters that all seeds of an experiment share; a checkpoint is identified by its experiment."""
    left_out = {"seed", *run.params.changeable} - {"num_epochs"}
    sources = {key: experiment(Path(name).parent) for key, name in run.params.checkpoints().items()}
    return {key: value for key, value in run.params.model_dump().items() if key not in left_out} | sources


def differing_settings(cell: Cell, others: Iterable[Cell], without: str = "") -> list[str]:
    """`key value` of each setting of a method in which `others`, cells of the same method, differ; of settings that are
    no numbers only those that are not the default.

    without: a setting to leave out.
    """
    fields = type(cell.runs[0].params).model_fields
    all_settings = [dict(other.description.settings) for other in others]
    return [f"{key} {value:g}" if is_number(value) else f"{key} {value}" for key, value in cell.description.settings
            if key != without and len({str(settings.get(key)) for settings in all_settings}) > 1
            and (is_number(value) or value != fields[key].default)]


def baseline_score(cell: Cell, others: Sequence[Cell]) -> tuple[int, int, bool, bool]:
    """Sort key to select the baseline of `others`: shared directories, shared recipe, below `baseline`, teacher of
    one of them."""
    common = max((shared(cell.experiment, other.experiment) for other in others), default=0)
    recipe = max((sum(cell.params.get(key) == other.params.get(key) for key in RECIPE) for other in others
                  if other.network == cell.network), default=0)
    return (common, recipe, "baseline" in cell.experiment.parts,
            any(other.source == cell.experiment for other in others))


def collections(cells: Sequence[Cell]) -> list[Collection]:
    """Group cells by audit, by the directory that contains `baseline`, `kd*`, `abd` or `ablations`, or else by the
    parent directory, and by data set."""
    from utils.datasets import DATASETS  # imports torch, which a report without runs does not need

    groups: dict[tuple[str, Path], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.params["dataset"], cell._place[0]), []).append(cell)
    found = []
    for (dataset, root), members in groups.items():
        words = DATASETS.entry(dataset).display_name if dataset in DATASETS else dataset
        is_only = sum(other == dataset for other, _ in groups) == 1
        found.append(Collection(dataset, words, dataset, members) if is_only else
                     Collection(f"{dataset} {root}", f"{words}, {root}", dataset, members))
    return found
