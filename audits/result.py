"""Result of an audit, and the schema of audit.json (`python audit.py --schema`)."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import BaseModel, Field

from audits.model import Evaluated
from audits.plan import Plan
from reports import verdicts
from reports.verdicts import Verdict
from runs.audits import LABELED, UNLABELED, AuditParams
from utils.quality import chance_threshold
from utils.results import Results

FORMAT = 1


class MeanStd(BaseModel):
    """Test accuracies of one experiment at the last epoch, in percent."""

    directory: str = Field(description="directory of the experiment; the run of seed N is in DIRECTORY/seedN")
    seeds: dict[int, float] = Field(description="test accuracy in percent, by seed")
    mean: float
    sd: float | None = Field(description="standard deviation over the seeds, percentage points; null for one seed")

    @classmethod
    def of(cls, directory: str, seeds: Mapping[int, float]) -> MeanStd:
        values = list(seeds.values())
        return cls(directory=directory, seeds=dict(seeds), mean=mean(values),
                   sd=stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


class Student(BaseModel):
    """Students of all seeds that one thief trains by one attack, or students without a teacher."""

    network: str
    images: int | None = Field(description="number of images that the student learns from; null: all training images")
    count: int = Field(description="number of images that the student learns from or, without data, of patches")
    thief: str
    victim: str = Field(description="attacked model: `model`, `unprotected`, `control` (answers that do not depend on "
                                    "the image) or `none` (a student of labels, without a teacher)")
    answers: str = Field(description="answers that the thief gets, such as `logits` or `label after mad:0.5`")
    answer_defense: str
    attack: str
    top_class_only: bool = Field(description="whether the student only uses the top class of each answer")
    accuracy: MeanStd


class ThiefVerdict(BaseModel):
    """Strongest attack of one thief, and its reference points.

    The strongest attack is the maximum over those tried, which favors the thief.
    """

    network: str
    images: int | None
    count: int
    thief: str
    answers: str
    attack: str = Field(description="strongest of the attacks tried")
    accuracy: MeanStd = Field(description="accuracy of the strongest attack's student")
    labels: MeanStd | None = Field(description="a student of the same images and their labels, without a teacher")
    label_smoothing: MeanStd | None = Field(description="a student of smoothed labels, without a teacher, at the best "
                                                         "strength tried")
    hard_label: MeanStd | None = Field(description="best student that only uses this model's top classes: the floor "
                                                   "of defenses that keep the top class")
    unprotected: MeanStd | None = Field(description="strongest attack on the unprotected model or, without one, on "
                                                    "this model's logits")
    control: MeanStd | None = Field(description="the strongest attack on answers that do not depend on the image")
    headroom: float | None = Field(description="strongest attack on the unprotected model minus that model's floor "
                                               "(hard labels or, for a thief with labels, the better student without "
                                               "a teacher), percentage points")
    headroom_left: float | None = Field(description="strongest attack on this model minus this model's floor (hard "
                                                    "labels or, for a thief with labels, the better student without a "
                                                    "teacher), percentage points")
    efficiency: float | None = Field(description="fraction of the headroom that protection takes; null if the "
                                                 "strongest attack on the unprotected model exceeds its floor or its "
                                                 "control by no more than the margin; above 1, the best student is "
                                                 "below the unprotected model's floor")
    margin: float = Field(description="differences within this number of percentage points are not significant: the "
                                      "standard deviation over seeds or the standard error of a difference on that "
                                      "number of test images, whichever is larger")
    sentence: str


class Audit(BaseModel):
    """The result of an audit."""

    format: int = FORMAT
    finished: bool
    params: dict[str, Any]
    model: dict[str, str] = Field(description="path and SHA-256 of the audited checkpoint")
    unprotected: dict[str, str] | None
    test_images: int
    classes: int
    verdicts: list[ThiefVerdict]
    students: list[Student]
    prices: dict[str, dict[str, float]] = Field(description="metrics of evaluate.py (price for clients, profile for a "
                                                            "student), by the answers that clients get")
    queries: list[int] = Field(description="numbers of images that single runs sent to the model")
    not_tried: dict[str, str] = Field(description="attacks that were not tried, with the reason")
    failed: list[str] = Field(description="directories of failed runs")
    seconds: float = Field(description="training and evaluation time, summed over the runs")
    runs: int
    versions: dict[str, Any]
    remarks: list[str]

    def verdict(self, thief: str, answers: str, images: int | None, network: str) -> ThiefVerdict | None:
        return next((each for each in self.verdicts if (each.thief, each.answers, each.images, each.network) == (
            thief, answers, images, network)), None)


def read_students(plan: Plan) -> tuple[list[Student], list[Results]]:
    """Finished students of a plan, and the results of their runs."""
    students: list[Student] = []
    records: list[Results] = []
    for attempt in plan.attempts:
        found = {seed: record for seed in plan.seeds
                 if (record := Results.read(attempt.run_directory(seed) / "results.json"))}
        if found:
            accuracies = {seed: record.last["test_accuracy"] for seed, record in found.items()}
            students.append(Student(
                network=attempt.student, images=attempt.images, count=attempt.count, thief=attempt.thief,
                victim=attempt.victim, answers=attempt.answers, answer_defense=attempt.answer_defense,
                attack=attempt.attack, top_class_only=attempt.top_class_only,
                accuracy=MeanStd.of(attempt.directory.as_posix(), accuracies)))
            records += found.values()
    return students, records


def judge_all(students: Sequence[Student], test_images: int) -> list[ThiefVerdict]:
    """One verdict per student network, number of images, thief and kind of answers."""
    kinds = dict.fromkeys((each.network, each.images, each.thief, each.answers) for each in students
                          if each.victim == "model")
    return [_judge(students, *kind, test_images=test_images) for kind in kinds]


def _judge(students: Sequence[Student], network: str, images: int | None, thief: str, answers: str, *,
           test_images: int) -> ThiefVerdict:
    peers = [each for each in students if each.network == network and each.thief == thief and each.images == images]
    own = {each.attack: each for each in peers if each.victim == "model" and each.answers == answers}
    plain = {each.attack: each for each in peers if each.victim == "unprotected"} or \
        {each.attack: each for each in peers if each.victim == "model" and each.answers in ("logits", "probabilities")}
    alone = [each for each in students if each.victim == "none" and each.network == network and each.images == images
             and thief in (LABELED, UNLABELED)]  # other thieves do not have the training images
    labels = next((each.accuracy for each in alone if each.attack == "labels"), None)
    smoothed = _better(*(each.accuracy for each in alone if each.attack != "labels"))
    hard_label = _hard_label(peers, own)
    alone_floor = _better(labels, smoothed) if thief == LABELED else None
    verdict = _verdict(own, alone_floor or hard_label)
    unprotected = _verdict(plain, alone_floor or _hard_label(peers, plain))
    assert verdict is not None
    compared = unprotected is not None and plain != own
    controls = {each.attack: each.accuracy for each in peers if each.victim == "control"}
    found = ThiefVerdict(
        network=network, images=images, count=own[verdict.attack].count, thief=thief, answers=answers,
        attack=verdict.attack, accuracy=own[verdict.attack].accuracy, labels=labels, label_smoothing=smoothed,
        hard_label=hard_label, unprotected=plain[unprotected.attack].accuracy if unprotected and compared else None,
        control=controls.get(verdict.attack),
        headroom=unprotected.headroom if unprotected else None, headroom_left=verdict.headroom,
        efficiency=_efficiency(unprotected, controls.get(unprotected.attack), verdict, test_images)
        if unprotected and compared else None,
        margin=margin(verdict, test_images), sentence="")
    return found.model_copy(update={"sentence": _sentence(found)})


def margin(verdict: Verdict[str], test_images: int) -> float:
    """Percentage points within which differences are not significant: the standard deviation over seeds or the
    standard error of the difference of two means (same number of seeds and test images), whichever is larger."""
    rate = mean(verdict.student) / 100
    error = 100 * math.sqrt(2 * rate * (1 - rate) / test_images / len(verdict.student))
    return max(verdict.noise, error)


def _efficiency(unprotected: Verdict[str], control: MeanStd | None, verdict: Verdict[str],
                test_images: int) -> float | None:
    """Fraction of the headroom that protection takes; None if the strongest attack on the unprotected model exceeds its
    floor or its control by no more than the margin: then there is no theft to prevent."""
    beyond_control = mean(unprotected.student) - control.mean if control else math.inf
    if min(unprotected.headroom or 0.0, beyond_control) <= margin(unprotected, test_images):
        return None
    return verdicts.efficiency(unprotected, verdict)


def _verdict(students: Mapping[str, Student], floor: MeanStd | None) -> Verdict[str] | None:
    """floor: students without a teacher, for a thief with labels; None: the student of hard labels is the floor."""
    return verdicts.judge({name: verdicts.Attempt(list(each.accuracy.seeds.values()), each.top_class_only)
                           for name, each in students.items()}, list(floor.seeds.values()) if floor else ())


def _hard_label(peers: Sequence[Student], of: Mapping[str, Student]) -> MeanStd | None:
    """Best student that only uses top classes, of the same model and answer defense as `of`, at any interface: all
    interfaces return the same top class."""
    one = next(iter(of.values()), None)
    return _better(*(each.accuracy for each in peers if one and each.top_class_only
                     and (each.victim, each.answer_defense) == (one.victim, one.answer_defense)))


def _better(*candidates: MeanStd | None) -> MeanStd | None:
    return max((each for each in candidates if each), key=lambda each: each.mean, default=None)


def _sentence(found: ThiefVerdict) -> str:
    """`distillable by ...` or `no attack tried beats ...`, and the accuracy of the best copy among attacks tried."""
    copy = f"the best copy, by {found.attack}, has {found.accuracy} %"
    if found.thief == LABELED:
        reference, label = _better(found.labels, found.label_smoothing), "the thief's own labels"
        if reference and found.control and found.control.mean > reference.mean:
            reference, label = found.control, "the same attack on answers that do not depend on the image"
    else:
        reference, label = found.hard_label, "hard labels"
    if reference is None:
        return copy
    gained = found.accuracy.mean - reference.mean
    if found.margin < gained < 1.25 * found.margin:
        return (f"barely distillable by {found.attack}: the best copy has {found.accuracy} %, {gained:.2f} points "
                f"above {label}, with a margin of {found.margin:.2f}")
    if gained > found.margin:
        return f"distillable by {found.attack}: the best copy has {found.accuracy} %, {gained:.1f} points above {label}"
    if gained > 0:
        return (f"no attack tried beats {label} by more than the margin of {found.margin:.2f}; {copy}, {gained:.2f} "
                "points above: more seeds or test images may decide")
    return f"no attack tried beats {label}; {copy}"


def _with_training_warning(found: ThiefVerdict, classes: int, accuracy: float) -> ThiefVerdict:
    """The verdict, with a sentence that says so if the students have learned little: the best one is hardly better than
    chance, or gains, like the student of labels, less than half of what the model gains over chance. accuracy: of the
    model, percent."""
    chance, advice = 100 / classes, "train them longer, or with another learning rate or batch size"
    if found.accuracy.mean < chance_threshold(classes):
        return found.model_copy(update={"sentence": (
            f"no verdict: the students have not learned, the best copy has {found.accuracy} % and chance is "
            f"{chance:.1f} %; {advice}")})
    if found.labels and max(found.labels.mean, found.accuracy.mean) - chance < (accuracy - chance) / 2:
        return found.model_copy(update={"sentence": (
            f"{found.sentence}. But labels alone give {found.labels} % where the model has {accuracy:.2f} %: these "
            f"students may not have learned enough for a verdict; {advice}")})
    return found


def summarize(plan: Plan, params: AuditParams, model: Evaluated, failed: Iterable[Path],
              versions: Mapping[str, Any]) -> Audit:
    """Result of the audit from the finished runs."""
    students, records = read_students(plan)
    accuracy = model.prices["logits"]["accuracy"]
    verdicts = [_with_training_warning(found, model.classes, accuracy)
                for found in judge_all(students, model.test_images)]
    return Audit(
        finished=len(records) == len(plan.directories()), params=params.model_dump(mode="json"),
        model=model.source, unprotected=model.unprotected, test_images=model.test_images, classes=model.classes,
        verdicts=verdicts, students=students, prices=model.prices,
        queries=sorted({count for record in records for count in record.queries.values()}),
        not_tried=plan.not_tried, failed=[str(directory) for directory in failed],
        seconds=sum(record.wall_time_seconds for record in records), runs=len(records), versions=dict(versions),
        remarks=model.remarks)
