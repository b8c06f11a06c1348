"""Verdicts on defenses from plain numbers, and the reference networks of a table of attacks."""
import pytest
from report_helpers import SCRATCH, report, student, teachers, write

from reports.verdicts import Attempt, efficiency, format_efficiency, judge

UNPROTECTED = judge({"kd": Attempt([84.0, 86.0]), "hard labels": Attempt([79.0, 81.0], top_class_only=True)})


def test_the_strongest_attack_is_the_best_by_the_mean_of_its_seeds():
    verdict = judge({"a": Attempt([90.0, 70.0]), "b": Attempt([81.0, 81.0])})
    assert (verdict.attack, verdict.student, verdict.floor) == ("b", [81.0, 81.0], ())


def test_the_floor_is_the_best_student_of_the_top_class_which_may_itself_be_the_strongest():
    verdict = judge({"kd": Attempt([70.0]), "first": Attempt([75.0], True), "second": Attempt([80.0], True)})
    assert verdict.attack == "second" and verdict.floor == [80.0] and verdict.headroom == 0
    assert not verdict.has_headroom


def test_there_is_no_verdict_without_an_attack():
    assert judge({}) is None


@pytest.mark.parametrize(("student_of_defended", "expected"), [(85.0, 0.0), (82.5, 0.5), (80.0, 1.0), (70.0, 3.0)])
def test_efficiency_is_the_fraction_of_the_headroom_that_is_lost(student_of_defended, expected):
    assert efficiency(UNPROTECTED, judge({"kd": Attempt([student_of_defended])})) == expected


def test_no_efficiency_if_the_headroom_is_within_the_standard_deviation():
    narrow = judge({"kd": Attempt([81.0, 81.0]), "hard labels": Attempt([78.0, 82.0], True)})
    defended = judge({"kd": Attempt([70.0])})
    assert narrow.headroom == 1 and narrow.noise > 2 and efficiency(narrow, defended) is None
    assert format_efficiency(narrow, defended) == "no headroom"


def test_no_efficiency_without_a_floor_or_an_unprotected_teacher():
    without = judge({"kd": Attempt([81.0])})
    assert without.headroom is None and efficiency(without, without) is None
    assert format_efficiency(without, UNPROTECTED) == format_efficiency(None, UNPROTECTED) == ""
    assert format_efficiency(UNPROTECTED, UNPROTECTED) == "" and format_efficiency(UNPROTECTED, without) == "0.80"


def test_students_are_compared_with_networks_of_as_many_labels(tmp_path):
    """The reference is not the network of all images, although its directory is nearer."""
    normal, _ = teachers(tmp_path)
    alone = SCRATCH | {"model_name": "net"}
    for name, smoothing, value in (("labels", 0.0, 70.0), ("smoothed", 0.1, 71.0)):
        write(tmp_path / "defenses/alone" / name, alone | {"label_smoothing": smoothing, "subset_size": 1000}, value)
        write(tmp_path / "attacks/alone" / name, alone | {"label_smoothing": smoothing}, value + 15)
    for budget in (None, 1000, 2000):
        write(tmp_path / f"attacks/{budget}", student(normal, queries="once", query_budget=budget), 69.0)
    found = {table.title.rpartition("labels")[2]: [line[2] for line in table.lines() if line[0].startswith("no teach")]
             for table in report(tmp_path).tables if table.title.startswith("Attacks")}
    assert found == {"": ["85.00", "86.00"], ", 1,000 images": ["70.00", "71.00"], ", 2,000 images": []}
