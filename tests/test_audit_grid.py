"""The grid of an audit, its verdicts and texts, without training."""
from pathlib import Path

import pytest
from conftest import FEW

from attacks import REGISTRY
from audits import document
from audits.plan import CORE, MAX_EPOCH_FACTOR, MIN_STEPS, plan
from audits.progress import duration, seconds_left
from audits.result import Audit, MeanStd, Student, _with_training_warning, judge_all
from runs.audits import LABELED, NO_DATA, UNLABELED
from runs.directories import Run
from runs.stages import AUDIT
from utils.errors import UserError
from utils.params import check_params
from utils.results import Results

SIZES = {"folder:images": 45, "cifar100": 100}
HARD_LABEL = {"attack": "hard_label"}


def params_of(**values):
    return check_params({"dataset": "folder:images", "model_name": "net", "checkpoint": "teacher", **FEW, **values},
                        Path("DIR/params.json"), AUDIT, {})


def grid(**values):
    return plan(params_of(**values), Path("DIR"), SIZES)


def of_victim(attempts, victim="model"):
    return [attempt for attempt in attempts if attempt.victim == victim]


FULL = {"preset": "full", "thieves": ["labeled", "unlabeled", "cifar100", "no_data"], "query_budgets": [20, None],
        "answer_defenses": ["none", "mad:0.5"], "unprotected": "original", "seeds": [0, 1],
        "students": [{"model_name": "net", "num_channels": 4}, {"model_name": "resnet18"}]}


@pytest.mark.parametrize("values", [{}, {"unprotected": "original"}, {"preset": "full"}, FULL],
                         ids=["core", "unprotected", "full", "all keys"])
def test_every_attempt_has_valid_parameters_and_its_own_directory(values):
    made = grid(**values)
    for attempt in made.attempts:
        assert attempt.params().num_epochs >= FEW["num_epochs"]
    directories = made.directories()
    assert len(set(directories)) == len(directories) == len(made.attempts) * len(made.seeds)
    assert all(directory.is_relative_to("DIR/runs") for directory in directories)


def test_the_presets_try_their_attacks_on_each_thief():
    core = of_victim(grid().attempts)
    assert {attempt.thief for attempt in core} == {LABELED, UNLABELED} and len(core) == 2 * len(CORE)
    full = of_victim(grid(preset="full").attempts)
    assert {attempt.thief for attempt in full} == {LABELED, UNLABELED, NO_DATA}
    assert {attempt.answers for attempt in full} > {"logits", "label"}
    left_out = grid(preset="full", answer_defenses=["none", "mad:0.5"]).not_tried
    assert set(left_out) == {"scm_chain"}  # a chain of runs


@pytest.mark.parametrize("values", [{}, {"preset": "full"}, {"attacks": ["kd", "htc", {"attack": "kd", "alpha": 1}]}])
def test_a_thief_without_labels_uses_no_labels(values):
    attempts = of_victim(grid(**values, thieves=["unlabeled", "cifar100"]).attempts)
    assert attempts
    for attempt in attempts:
        params = attempt.params()
        assert not params.labeled and not params.needs_labels
        if REGISTRY[params.attack].Params().needs_labels:
            assert params.alpha == 1


@pytest.mark.parametrize("values", [{}, {"preset": "full"}, {"attacks": ["kd"]},
                                    {"attacks": ["kd"], "interfaces": ["label", "top_k:2"]}])
def test_hard_labels_are_always_tried(values):
    attempts = of_victim(grid(**values).attempts)
    for thief in (LABELED, UNLABELED):
        for answers in {attempt.answers for attempt in attempts}:
            found = [attempt.params() for attempt in attempts if attempt.thief == thief and attempt.answers == answers]
            assert any(params.attack == "hard_label" for params in found)


def test_each_student_has_references_of_its_network_and_images():
    made = grid(attacks=["kd"], query_budgets=[20, None], students=[{"model_name": "net"}, {"model_name": "resnet18"}])
    for student in ("net32", "resnet18"):
        for images in (20, None):
            alike = [each for each in made.attempts if each.student == student and each.images == images]
            assert {each.attack for each in of_victim(alike, "none")} > {"labels"}
            assert {each.attack for each in of_victim(alike, "control")} == {"KD", "Hard label"}
            assert {each.answers for each in of_victim(alike, "control")} == {"uniform", "class_mean"}


def test_a_smaller_budget_means_more_epochs_and_smaller_batches():
    made = grid(attacks=["kd"], query_budgets=[5, 20, None], num_epochs=10, schedule=[6], batch_size=8)
    recipes = {each.images: each.params() for each in made.attempts if each.victim == "model"}
    assert [recipes[images].num_epochs for images in (None, 20, 5)] == [10, round(10 * 45 / 20), 10 * MAX_EPOCH_FACTOR]
    assert [recipes[images].schedule for images in (None, 20, 5)] == [[6], [round(6 * 45 / 20)], [6 * MAX_EPOCH_FACTOR]]
    assert [recipes[images].batch_size for images in (None, 20, 5)] == [8, 20 // MIN_STEPS, 2]
    assert [recipes[images].query_budget for images in (None, 20, 5)] == [None, 20, 5]
    alone = {each.images: each.params() for each in of_victim(made.attempts, "none")}
    assert alone[20].subset_size == 20 and alone[20].num_epochs == recipes[20].num_epochs


def test_references_of_another_audit_are_not_trained_again(tmp_path):
    params = params_of(unprotected="DIR")
    own = plan(params, tmp_path, SIZES, references=Path("DIR"))
    assert {attempt.victim for attempt in own.attempts} == {"model"}
    theirs = grid().as_unprotected()
    assert {attempt.victim for attempt in theirs.attempts} == {"none", "control", "unprotected"}
    assert {attempt.answers for attempt in of_victim(theirs.attempts, "unprotected")} == {"logits"}


@pytest.mark.parametrize(("values", "words"), [
    ({"attacks": ["nope"]}, ['"attacks"', "'nope'"]),
    ({"attacks": [{"temperature": 4}]}, ['"attacks"', 'no "attack"']),
    ({"attacks": ["kd", {"attack": "kd", "temperature": -1}]}, ["DIR/params.json", '"attacks"', '"temperature" is -1']),
    ({"attacks": ["kd", {"attack": "kd", "temperatur": 1}]}, ["DIR/params.json", '"attacks"', '"temperatur"']),
    ({"attacks": []}, ["DIR/params.json", '"attacks"']),
    ({"attacks": ["kd"], "thieves": ["no_data"]}, ["DIR/params.json", '"attacks"', "kd"]),
    ({"attacks": ["kd", "kd"]}, ["DIR/params.json", '"attacks" has "kd" twice']),
    ({"attacks": ["kd", {"attack": "kd"}]}, ["DIR/params.json", "/kd: ", "twice"]),
    ({"interfaces": ["logits", "probabilities"], "answer_defenses": ["mad:1"]}, ["DIR/params.json", "twice"]),
    ({"interfaces": []}, ["DIR/params.json", '"interfaces"']),
    ({"seeds": [0, 0]}, ["DIR/params.json", '"seeds" has 0 twice']),
    ({"query_budgets": [None, None]}, ["DIR/params.json", '"query_budgets" has null twice']),
    ({"query_budgets": [46]}, ["DIR/params.json", '"query_budgets" has 46', "45 training images"]),
    ({"query_budgets": [1]}, ["DIR/params.json", '"query_budgets"']),
    ({"students": [{"num_channels": 4}]}, ["DIR/params.json", '"students"', "model_name"]),
    ({"students": [{"model_name": "net"}, {"model_name": "net", "num_channels": 32}]}, ["DIR/params.json", "twice"]),
    ({"seed": 1}, ["DIR/params.json", '"seed"', '"seeds"']),
    ({"subset_size": 9}, ["DIR/params.json", '"subset_size"', '"query_budgets"']),
    ({"preset": "half"}, ["DIR/params.json", '"preset"']),
])
def test_an_invalid_grid_is_one_error_line(values, words):
    with pytest.raises(UserError) as caught:
        grid(**values)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_an_empty_grid_names_the_file_and_the_reasons():
    with pytest.raises(UserError, match=r"DIR/params\.json: .*kd"):
        grid(attacks=[{"attack": "kd", "temperature": -1}], thieves=["unlabeled"])
    with pytest.raises(UserError, match=r"DIR/params\.json: the grid is empty"):
        grid(thieves=["unlabeled"], validation_fraction=0.2)


def test_a_run_with_other_parameters_is_refused(tmp_path):
    attempt = plan(params_of(), tmp_path, SIZES).attempts[0]
    attempt.write(0)
    attempt.check(0)
    for key, value in (("num_epochs", 3), ("batch_size", 4), ("learning_rate", 0.1)):
        other = plan(params_of(**{key: value}), tmp_path, SIZES).attempts[0]
        with pytest.raises(UserError, match=f"{key} .*--restart"):
            other.check(0)
    (attempt.run_directory(0) / "params.json").write_text("{")
    with pytest.raises(UserError, match=r"params\.json"):
        attempt.check(0)


# Verdicts on students with given accuracies

def student(accuracy, attack="KD", *, thief=UNLABELED, victim="model", answers="logits", top_class_only=False,
            images=None, network="net4", answer_defense="none"):
    seeds = dict(enumerate(accuracy if isinstance(accuracy, list) else [accuracy]))
    return Student(network=network, images=images, count=images or 45, thief=thief, victim=victim, answers=answers,
                   attack=attack, answer_defense=answer_defense, top_class_only=top_class_only,
                   accuracy=MeanStd.of(f"{thief}/{victim}/{answers}/{attack}", seeds))


def hard(accuracy, **values):
    return student(accuracy, "Hard label", top_class_only=True, **values)


def verdict_on(*students, test_images=10_000):
    found, = judge_all(students, test_images)
    return found


def test_headroom_is_the_strongest_attack_minus_hard_labels():
    found = verdict_on(student(90.0), student(85.0, "HTC"), hard(80.0))
    assert (found.attack, found.accuracy.mean, found.hard_label.mean) == ("KD", 90.0, 80.0)
    assert found.headroom == found.headroom_left == 10.0
    assert found.unprotected is None and found.efficiency is None
    assert found.sentence == "distillable by KD: the best copy has 90.00 %, 10.0 points above hard labels"


def test_efficiency_is_the_fraction_of_the_headroom_that_protection_takes():
    plain = [student(90.0, victim="unprotected"), hard(80.0, victim="unprotected")]
    found = verdict_on(*plain, student(84.0), hard(79.0))
    assert (found.headroom, found.headroom_left) == (10.0, 5.0) and found.efficiency == pytest.approx(0.6)
    assert found.unprotected.mean == 90.0
    worse = verdict_on(*plain, student(70.0), hard(75.0))
    assert worse.efficiency == pytest.approx(1.5) and worse.headroom_left == 0 and worse.attack == "Hard label"


def test_a_label_only_interface_leaves_nothing_where_its_students_equal_the_floor():
    label = {"answers": "label", "top_class_only": True}
    students = [student(90.0), hard(80.0), student(80.0, **label), student(80.0, "HTC", **label)]
    on_logits, on_labels = judge_all(students, 10_000)
    assert on_logits.efficiency is None and on_logits.headroom_left == 10
    assert on_labels.headroom_left == 0 and on_labels.efficiency == 1 and on_labels.headroom == 10
    assert on_labels.sentence == "no attack tried beats hard labels; the best copy, by KD, has 80.00 %"


def test_the_floor_of_a_thief_with_labels_is_a_student_of_labels():
    alone = [student(82.0, "labels", thief=LABELED, victim="none", answers=""),
             student(84.0, "label smoothing 0.1", thief=LABELED, victim="none", answers="")]
    found = verdict_on(*alone, student(86.0, thief=LABELED), hard(70.0, thief=LABELED))
    assert (found.labels.mean, found.label_smoothing.mean, found.headroom_left) == (82.0, 84.0, 2.0)
    assert found.sentence == "distillable by KD: the best copy has 86.00 %, 2.0 points above the thief's own labels"
    found = verdict_on(*alone, student(83.0, thief=LABELED), hard(70.0, thief=LABELED))
    assert found.headroom_left == -1.0 and found.sentence.startswith("no attack tried beats the thief's own labels; ")


def test_a_control_is_that_of_the_strongest_attack():
    found = verdict_on(student(86.0, thief=LABELED), student(60.0, "KD", thief=LABELED, victim="control"),
                       student(70.0, "HTC", thief=LABELED, victim="control"))
    assert found.control.mean == 60.0


def test_an_attack_that_does_not_beat_its_control_is_no_theft():
    labels = student(82.0, "labels", thief=LABELED, victim="none", answers="")
    found = verdict_on(labels, student(86.0, thief=LABELED), student(86.5, thief=LABELED, victim="control"))
    assert found.sentence.startswith("no attack tried beats the same attack on answers that do not depend on the image")


def test_there_is_no_efficiency_if_the_unprotected_model_is_not_stolen_either():
    """A headroom of 4 points, of which the control of the strongest attack leaves 3 or none."""
    students = [student(82.0, "labels", thief=LABELED, victim="none", answers=""),
                student(86.0, thief=LABELED, victim="unprotected"), student(84.0, thief=LABELED)]
    for control, efficiency in ((83.0, 0.5), (86.5, None), (85.9, None)):
        found = verdict_on(*students, student(control, thief=LABELED, victim="control"))
        assert (found.headroom, found.efficiency) == (4.0, efficiency)


def test_differences_within_the_margin_are_no_theft():
    seeds = [student([80.0, 84.0]), hard([80.0, 81.0])]
    assert verdict_on(*seeds).sentence.startswith("no attack tried beats hard labels")
    one = [student(84.0), hard(80.0)]
    assert verdict_on(*one, test_images=10_000).sentence.startswith("distillable")
    assert verdict_on(*one, test_images=20).sentence.startswith("no attack tried beats hard labels")
    assert verdict_on(*one, test_images=100).margin == pytest.approx(100 * (2 * 0.84 * 0.16 / 100) ** 0.5)


def test_a_difference_within_the_margin_is_named_as_undecided():
    sentence = verdict_on(student(84.0), hard(80.0), test_images=20).sentence
    assert "by more than the margin of" in sentence and "4.00 points above: more seeds or test images" in sentence


def test_students_that_have_not_learned_give_no_verdict():
    chance = verdict_on(student(34.0), hard(33.3))
    assert "no verdict: the students have not learned" in _with_training_warning(chance, 3, 90.0).sentence
    assert _with_training_warning(chance, 10, 90.0) == chance


def test_a_verdict_says_so_if_neither_labels_nor_an_attack_give_half_of_the_gain_over_chance():
    """Ten classes, a model of 90 %: half of the gain is 50 %."""
    for labels, attack, doubted in ((49.0, 49.0, True), (51.0, 49.0, False), (49.0, 88.0, False)):
        found = verdict_on(student(attack), hard(44.0), student(labels, "labels", victim="none", answers=""))
        sentence = _with_training_warning(found, 10, 90.0).sentence
        assert sentence.startswith(found.sentence)
        assert (f"labels alone give {labels:.2f} % where the model has 90.00 %" in sentence) == doubted


def test_a_thief_without_images_has_no_floor():
    found = verdict_on(student(50.0, "patches", thief=NO_DATA), student(90.0, victim="unprotected"))
    assert found.headroom is None and "no headroom" not in document.terminal(audit_of([
        student(50.0, "patches", thief=NO_DATA), student(90.0, thief=NO_DATA, victim="unprotected")]), Path("DIR"))
    assert found.sentence == "the best copy, by patches, has 50.00 %"


def audit_of(students, answers=("logits",), **values):
    price = {"accuracy": 91.0, "cross_entropy": 0.3, "entropy": 0.1}
    return Audit(finished=True, params=params_of().model_dump(), model={"path": "a" * 60, "sha256": "0"},
                 unprotected=None, test_images=1000, classes=3, verdicts=judge_all(students, 1000), students=students,
                 prices={name: price for name in answers}, queries=[45], not_tried={}, failed=[], seconds=1.0,
                 runs=len(students), versions={}, remarks=[], **values)


def test_the_summary_has_at_most_40_lines_for_any_grid():
    answers = ["logits", "label", *(f"{at} after {defense}" for at in ("top_k:3", "round:1", "logits")
                                    for defense in ("mad:0.5", "modelguard_w:1", "reverse_sigmoid:1"))]
    students = [each for at in answers for thief in (LABELED, UNLABELED, "folder:of/foreign/images")
                for images in (1000, 20_000, None)
                for each in (student(90.0, "Logit standardization, temperature 20", thief=thief, answers=at,
                                     images=images), hard(80.0, thief=thief, answers=at, images=images))]
    text = document.terminal(audit_of(students, answers), Path("DIR"))
    assert len(text.splitlines()) <= 40, text


def test_no_report_calls_a_model_secure():
    found = audit_of([student(70.0), hard(80.0)])
    for text in (document.terminal(found, Path("DIR")), document.document(found, params_of(), Path("DIR")),
                 *(verdict.sentence for verdict in found.verdicts)):
        assert "secur" not in text.lower() and "cannot be stolen" not in text


def test_audit_json_survives_a_round_trip():
    found = audit_of([student([70.0, 71.0]), hard(80.0)])
    assert Audit.model_validate_json(found.model_dump_json()) == found


def test_the_remaining_time_is_estimated_from_finished_runs():
    finished = [Run(Path("a"), params_of(), Results("", {}, {}, {}, wall_time_seconds=8.0))]
    assert seconds_left({Path("a"): 10, Path("b"): 30}, finished, jobs=2) == pytest.approx(15)
    assert seconds_left({Path("b"): 30}, [], jobs=2) is None
    assert [duration(each) for each in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]
