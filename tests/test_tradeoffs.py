"""Tradeoffs: accuracy of a defended teacher against accuracy of the strongest attack's student."""
import json

import pytest
from report_helpers import SCRATCH, report, student, teachers, write

import defenses
from reports import figures
from utils.results import is_number

ONCE = {"queries": "once", "query_budget": 1000}
NO_LABELS = {**ONCE, "labels": 0, "alpha": 1}


def defend(directory, accuracy, **params):
    """Write a network with a trained-in defense."""
    write(directory / "teacher", SCRATCH | {"model_name": "resnet18"} | params, accuracy)
    results = json.loads((directory / "teacher/results.json").read_text())
    (directory / "teacher/results.json").write_text(json.dumps(results | {"stage": "train_nasty.py"}))
    return directory / "teacher"


def attack(directory, teacher, accuracy, name="kd_t1", answering=None, **params):
    """Write a student by KD, or by hard labels with `interface`. answering: accuracy of the teacher's answers."""
    place = directory / name
    params = student(teacher, temperature=1, **NO_LABELS) | params
    write(place, params, accuracy)
    if answering is not None:
        results = json.loads((place / "results.json").read_text())
        role = f"teacher as it answers (logits after {params['answer_defense']})"
        (place / "results.json").write_text(json.dumps(results | {"evaluated_before": {
            role: {"test_accuracy": answering}}}))


@pytest.fixture
def root(tmp_path):
    """Write a normal teacher, CMIM at three weights, a nasty teacher, and two strengths of MAD; without labels."""
    normal, nasty = teachers(tmp_path)
    place = tmp_path / "defenses"
    write(place / "alone/labels", SCRATCH | {"model_name": "net", "subset_size": 1000}, 75.0)
    attack(place / "none", normal, 84.0)
    attack(place / "none", normal, 80.0, "label", interface="label")
    attack(place / "nasty", nasty, 83.5)
    for weight, own, students in ((10, 80.0, 79.0), (0.5, 94.0, 83.0), (2, 90.0, 82.0)):
        teacher = defend(place / f"cmim_{weight}", own, defense="cmim", weight=weight)
        attack(place / f"cmim_{weight}", teacher, students)
        attack(place / f"cmim_{weight}", teacher, students - 9, "kd_t9", temperature=9)
    for strength, students in ((1, 81.0), (0.5, 82.0)):
        attack(place / f"answers/mad_{strength}", normal, students, answering=95.0 - strength,
               answer_defense=f"mad:{strength}")
    return tmp_path


def tradeoff(root):
    found, = report(root).tradeoffs
    return found


def test_the_table_has_one_line_per_teacher_in_the_order_of_strength(root):
    heads, *lines = tradeoff(root).table()
    assert heads == ["defense", "strength", "teacher, %", "strongest attack", "its student, %",
                     "floor, %", "efficiency"]
    assert [line[:3] + line[4:] for line in lines] == [
        ["none", "", "95.00", "84.00", "80.00", ""],
        ["CMIM", "weight 0.5", "94.00", "83.00", "", "0.25"],
        ["CMIM", "weight 2", "90.00", "82.00", "", "0.50"],
        ["CMIM", "weight 10", "80.00", "79.00", "", "1.25"],
        ["nasty", "weight 0.04", "94.00", "83.50", "", "0.12"],
        ["MAD", "0.5", "94.50", "82.00", "", "0.50"],
        ["MAD", "1", "94.00", "81.00", "", "0.75"]]
    assert all(line[3] == "KD, temperature 1" for line in lines)


def test_a_normal_teacher_that_trained_on_is_a_control_beside_the_unprotected_one(root):
    normal = teachers(root)[0]
    write(root / "defenses/continued/teacher", SCRATCH | {"model_name": "resnet18",
                                                          "init_from": str(normal / "best_model.tar")}, 96.0)
    attack(root / "defenses/continued", root / "defenses/continued/teacher", 83.0)
    lines = tradeoff(root).table()
    assert [line[:3] + line[4:] for line in lines[1:3]] == [
        ["none", "", "95.00", "84.00", "80.00", ""],
        ["continued training", "", "96.00", "83.00", "", "0.25"]]


@pytest.mark.parametrize(("changes", "kind"), [
    ({}, "continued"), ({"dataset": "cifar100"}, "normal"), ({"model_name": "net"}, "normal"),
    ({"init_from": "weights.pth"}, "normal"), ({"init_from": "elsewhere/last_model.tar"}, "unknown"),
    ({"init_from": "NASTY"}, "unknown"), ({"init_from": "more/net/last_model.tar"}, "unknown")])
def test_only_a_network_that_starts_from_a_normal_one_of_its_kind_is_continued_training(tmp_path, changes, kind):
    normal, nasty = (str(directory / "last_model.tar") for directory in teachers(tmp_path))
    params = SCRATCH | {"model_name": "resnet18", "init_from": normal} | changes
    write(tmp_path / "more/net", params | ({"init_from": nasty} if params["init_from"] == "NASTY" else {}), 96.0)
    told = report(tmp_path)
    cell, = (cell for collection in told.collections for cell in collection.cells
             if cell.experiment == tmp_path / "more/net")
    assert cell.kind == kind
    assert any("does not count as a normal network" in text for text in told.warnings) == ("elsewhere" in str(changes))


def test_the_references_are_labels_of_as_many_images_and_hard_labels_of_the_normal_teacher(root):
    assert tradeoff(root).references == {"labels, no teacher": [75.0], "hard labels of the normal teacher": [80.0]}


def test_teachers_that_differ_in_another_setting_are_another_series_which_is_named_by_it(root):
    teacher = defend(root / "defenses/cmim_slow", 91.0, defense="cmim", weight=2, decay=0.5)
    attack(root / "defenses/cmim_slow", teacher, 82.5)
    found = {series.title: len(series.points) for series in tradeoff(root).series}
    assert found == {"no defense": 1, "CMIM, decay 0.99, by weight": 3, "CMIM, decay 0.5, weight 2": 1,
                     "nasty, weight 0.04": 1, "MAD": 2}


def test_teachers_of_another_recipe_are_another_series_which_is_named_by_its_place(root):
    teacher = defend(root / "defenses/cmim_long", 91.0, defense="cmim", weight=4, num_epochs=9)
    attack(root / "defenses/cmim_long", teacher, 82.5)
    titles = [series.title for series in tradeoff(root).series]
    assert f"CMIM, {teacher}, weight 4" in titles and len(titles) == 5


def test_an_answer_defense_in_front_of_a_defended_teacher_is_named_with_both(root):
    attack(root / "defenses/both", root / "defenses/cmim_2/teacher", 78.0, answering=89.0, answer_defense="mad:0.5")
    lines = {tuple(line[:2]): line[2:] for line in tradeoff(root).table()}
    assert lines["CMIM 2 + MAD", "0.5"][:3] == ["89.00", "KD, temperature 1", "78.00"]


def test_answers_that_depend_on_the_order_of_the_queries_have_the_accuracy_of_their_profile(root):
    place = root / "defenses/answers/modelguard_s"
    attack(place, root / "baseline/resnet18", 81.5, answer_defense="modelguard_s:1")
    results = json.loads((place / "kd_t1/results.json").read_text())
    (place / "kd_t1/results.json").write_text(json.dumps(results | {"details": {"answers": {"accuracy": 94.9}}}))
    assert ["ModelGuard-S", "1", "94.90"] in [line[:3] for line in tradeoff(root).table()]


def test_seeds_are_one_point_with_a_standard_deviation(root):
    place = root / "defenses/cmim_2"
    params = json.loads((place / "teacher/params.json").read_text()) | {"seed": 1}
    write(place / "teacher/seed1", params, 92.0)
    results = json.loads((place / "teacher/seed1/results.json").read_text())
    (place / "teacher/seed1/results.json").write_text(json.dumps(results | {"stage": "train_nasty.py"}))
    attack(place / "kd_t1", place / "teacher/seed1", 84.0, "seed1", seed=1)
    line, = (line for line in tradeoff(root).table() if line[1] == "weight 2")
    assert (line[2], line[4]) == ("91.00 ± 1.41", "83.00 ± 1.41")


def test_thieves_with_labels_have_a_figure_of_their_own(root):
    attack(root / "defenses/labels", root / "defenses/cmim_2/teacher", 82.0, labels=1, alpha=0.9)
    assert {found.title.split(", ")[-3] for found in report(root).tradeoffs} == {"labels", "no labels"}


def test_no_tradeoff_without_an_attacked_defense(tmp_path):
    normal, _ = teachers(tmp_path)
    attack(tmp_path / "defenses/none", normal, 84.0)
    assert not report(tmp_path).tradeoffs


def test_tradeoffs_are_drawn_and_listed(root):
    told = report(root)
    files, failures = told.write(root / "out")
    assert not failures and "tradeoff-cifar10-net-no-labels-1000-images.png" in {file.name for file in files}
    assert "## Protection and its price" in told.markdown() and "Protection and its price" in told.text()


def test_strengths_are_beside_the_points_of_a_series(root):
    figure = figures._scatter_plot(tradeoff(root))
    written = sorted(text.get_text() for text in figure.axes[0].texts)
    assert written == ["0.5", "0.5", "1", "10", "2"]
    lines = [line for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [94.0, 90.0, 80.0]]
    assert [list(line.get_ydata()) for line in lines] == [[83.0, 82.0, 79.0]]


def test_points_of_equal_values_are_drawn_side_by_side(root):
    attack(root / "defenses/answers/stingy", root / "baseline/resnet18", 81.0, answering=94.0,
           answer_defense="stingy:2")
    marks = figures._marks(tradeoff(root).series).values()
    assert sorted(mark.right for mark in marks if (mark.x, mark.y) == (94.0, 81.0)) == [-6, 6]
    assert {mark.right for mark in marks if (mark.x, mark.y) != (94.0, 81.0)} == {0}


@pytest.mark.parametrize("name", defenses.REGISTRY)
def test_the_strength_of_every_defense_is_one_of_its_numbers(name):
    params = defenses.REGISTRY[name].Params
    assert not params.strength or is_number(params.model_fields[params.strength].default)
