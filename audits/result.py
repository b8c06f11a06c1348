"""What an audit found: audit.json, of which these classes are the schema (`python audit.py --schema`)."""
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
from utils.results import Results

FORMAT = 1


class MeanStd(BaseModel):
    """Test accuracies at the last epoch, percent, of one experiment."""

    directory: str = Field(description="directory of the experiment; the run of seed N is in DIRECTORY/seedN")
    seeds: dict[int, float] = Field(description="test accuracy by seed, percent")
    mean: float
    sd: float | None = Field(description="standard deviation over the seeds, points; null for one seed")

    @classmethod
    def of(cls, directory: str, seeds: Mapping[int, float]) -> MeanStd:
        values = list(seeds.values())
        return cls(directory=directory, seeds=dict(seeds), mean=mean(values),
                   sd=stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"


class Student(BaseModel):
    """One attack of one thief, or a student without a teacher, with the runs of all seeds."""

    network: str
    images: int | None = Field(description="query budget, the number of training images; null: all")
    count: int = Field(description="number of training images or, for a thief without data, patches")
    thief: str
    victim: str = Field(
        description="teacher: `model`, `unprotected`, `control` (answers that do not depend on the image) or `none` "
                    "(labels only)")
    answers: str = Field(description="answers that the thief got, such as `logits` or `probabilities after mad:1`")
    answer_defense: str
    attack: str
    top_class_only: bool = Field(description="whether the student learned only the top class of each answer")
    accuracy: MeanStd


class ThiefVerdict(BaseModel):
    """What one kind of thief gets: the strongest attack of those tried, beside its reference points.

    The strongest attack is a maximum over those tried, which errs on the thief's side.
    """

    network: str
    images: int | None
    count: int
    thief: str
    answers: str
    attack: str = Field(description="strongest attack of those tried")
    accuracy: MeanStd = Field(description="accuracy of the student of the strongest attack")
    labels: MeanStd | None = Field(description="student trained on the labels of the same images, without a teacher")
    label_smoothing: MeanStd | None = Field(description="student trained on the labels with label smoothing, the best "
                                                        "strength")
    hard_label: MeanStd | None = Field(description="best student that uses only this model's top classes: the floor of "
                                                   "defenses that keep the top class")
    unprotected: MeanStd | None = Field(
        description="strongest attack on the unprotected model or, without one, on this model's logits")
    control: MeanStd | None = Field(description="strongest attack, on answers that do not depend on the image")
    headroom: float | None = Field(description="strongest attack on the unprotected model minus the floor of that "
                                              "model, points. The floor: its hard-label student or, for a thief "
                                              "with labels, the better student of labels only")
    headroom_left: float | None = Field(description="strongest attack minus the floor of this model, points")
    efficiency: float | None = Field(description="fraction of the headroom that protection takes; null if the headroom "
                                                 "is within the margin; above 1 if students are below the "
                                                 "unprotected model's floor")
    margin: float = Field(description="differences within it are not significant, points: the standard deviation over "
                                      "seeds or the standard error of a difference on that number of test images, "
                                      "whichever is larger")
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
    prices: dict[str, dict[str, float]] = Field(description="metrics of the answers, as of evaluate.py, by kind of "
                                                            "answers")
    queries: list[int] = Field(description="distinct numbers of queries per run")
    not_tried: dict[str, str] = Field(description="attacks that were not tried, with the reason")
    failed: list[str] = Field(description="directories of failed runs")
    seconds: float = Field(description="total training and evaluation time of the runs, seconds")
    runs: int
    versions: dict[str, Any]
    remarks: list[str]

    def verdict(self, thief: str, answers: str, images: int | None, network: str) -> ThiefVerdict | None:
        return next((each for each in self.verdicts if (each.thief, each.answers, each.images, each.network) == (
            thief, answers, images, network)), None)


def read_students(plan: Plan) -> tuple[list[Student], list[Results]]:
    """The students of a plan that are finished, and the records of their runs."""
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
    """A verdict for each network of students, number of images, kind of thief and kind of answers."""
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
             and thief in (LABELED, UNLABELED)]  # others have other images
    labels = next((each.accuracy for each in alone if each.attack == "labels"), None)
    smoothed = _better(*(each.accuracy for each in alone if each.attack != "labels"))
    hard_label = _hard_label(peers, own)
    alone_floor = _better(labels, smoothed) if thief == LABELED else None
    verdict = _verdict(own, alone_floor or hard_label)
    unprotected = _verdict(plain, alone_floor or _hard_label(peers, plain))
    assert verdict is not None
    compared = unprotected is not None and plain != own
    found = ThiefVerdict(
        network=network, images=images, count=own[verdict.attack].count, thief=thief, answers=answers,
        attack=verdict.attack, accuracy=own[verdict.attack].accuracy, labels=labels, label_smoothing=smoothed,
        hard_label=hard_label, unprotected=plain[unprotected.attack].accuracy if unprotected and compared else None,
        control=next((each.accuracy for each in peers if each.victim == "control" and each.attack == verdict.attack),
                     None),
        headroom=unprotected.headroom if unprotected else None, headroom_left=verdict.headroom,
        efficiency=_efficiency(unprotected, verdict, test_images) if unprotected and compared else None,
        margin=margin(verdict, test_images), sentence="")
    return found.model_copy(update={"sentence": _sentence(found)})


def margin(verdict: Verdict[str], test_images: int) -> float:
    """Points within which two students are not told apart: the larger standard deviation of the seeds or, if that is
    more, the standard error of the difference of two means of as many seeds, each on so many test images."""
    rate = mean(verdict.student) / 100
    error = 100 * math.sqrt(2 * rate * (1 - rate) / test_images / len(verdict.student))
    return max(verdict.noise, error)


def _efficiency(unprotected: Verdict[str], verdict: Verdict[str], test_images: int) -> float | None:
    """None where the headroom of the unprotected model is within its margin."""
    if (unprotected.headroom or 0.0) <= margin(unprotected, test_images):
        return None
    return verdicts.efficiency(unprotected, verdict)


def _verdict(students: Mapping[str, Student], floor: MeanStd | None) -> Verdict[str] | None:
    """floor: what a thief gets without the model, where he has labels; else it is his student of hard labels."""
    return verdicts.judge({name: verdicts.Attempt(list(each.accuracy.seeds.values()), each.top_class_only)
                           for name, each in students.items()}, list(floor.seeds.values()) if floor else ())


def _hard_label(peers: Sequence[Student], of: Mapping[str, Student]) -> MeanStd | None:
    """The best student of the top classes alone that these students' model gives behind their answer defense: of any
    interface, as all that has a top class gives the same one."""
    one = next(iter(of.values()), None)
    return _better(*(each.accuracy for each in peers if one and each.top_class_only
                     and (each.victim, each.answer_defense) == (one.victim, one.answer_defense)))


def _better(*candidates: MeanStd | None) -> MeanStd | None:
    return max((each for each in candidates if each), key=lambda each: each.mean, default=None)


def _sentence(found: ThiefVerdict) -> str:
    """What the best copy reaches, and `distillable by ...` or `no attack tried beats ...`; no more than was tried."""
    copy = f"the best copy, by {found.attack}, has {found.accuracy} %"
    if found.thief == LABELED:
        reference, label = _better(found.labels, found.label_smoothing), "the thief's own labels"
        if reference and found.control and found.control.mean > reference.mean:
            reference, label = found.control, "the same attack on answers that know nothing of the image"
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
    return f"no attack tried beats {label}; {copy}"


def summarize(plan: Plan, params: AuditParams, model: Evaluated, failed: Iterable[Path],
              versions: Mapping[str, Any]) -> Audit:
    """The audit as far as its runs are finished."""
    students, records = read_students(plan)
    return Audit(
        finished=len(records) == len(plan.directories()), params=params.model_dump(mode="json"),
        model=model.source, unprotected=model.unprotected, test_images=model.test_images, classes=model.classes,
        verdicts=judge_all(students, model.test_images), students=students, prices=model.prices,
        queries=sorted({count for record in records for count in record.queries.values()}),
        not_tried=plan.not_tried, failed=[str(directory) for directory in failed],
        seconds=sum(record.wall_time_seconds for record in records), runs=len(records), versions=dict(versions),
        remarks=model.remarks)
