"""Tables of thefts: one row per attack, one column per teacher."""
import shutil

import pytest
from report_helpers import SCRATCH, report, rows, student, teachers, write


def test_finished_networks_stay_in_a_table_before_the_first_attack(tmp_path):
    write(tmp_path / "baseline/net", SCRATCH | {"model_name": "net"}, 60.0)
    write(tmp_path / "baseline/smoothed", SCRATCH | {"model_name": "net", "label_smoothing": 0.1}, 61.0)
    write(tmp_path / "attacks/hard_label", SCRATCH | {
        "model_name": "net", "teacher_model": "net", "attack": "hard_label", "labels": 0, "queries": "once",
        "teacher_resume": f"{tmp_path}/baseline/net/last_model.tar"})
    assert not report(tmp_path).hidden


def test_networks_that_a_table_of_attacks_shows_have_no_second_table(tmp_path):
    def titles(root):
        return [table.title.split(",")[0] for table in report(root).tables]

    runs = tmp_path / "runs"
    write(runs / "labels", SCRATCH | {"model_name": "net", "num_channels": 8}, 60.0)
    write(runs / "hard_label", SCRATCH | {
        "model_name": "net", "num_channels": 8, "teacher_model": "net", "attack": "hard_label", "labels": 0,
        "queries": "once", "teacher_resume": f"{tmp_path}/elsewhere/last_model.tar"}, 70.0)
    assert titles(runs) == ["Attacks"]
    write(runs / "other", SCRATCH | {"model_name": "net", "num_channels": 4}, 50.0)  # in no table of attacks
    assert titles(runs) == ["Students with data", "Attacks"]
    shutil.rmtree(runs / "other")
    write(runs / "published", SCRATCH | {"model_name": "resnet18"}, 95.0)
    write(runs / "of_published", SCRATCH | {
        "model_name": "resnet18", "teacher_model": "resnet18", "attack": "hard_label", "labels": 0, "queries": "once",
        "teacher_resume": f"{runs}/published/last_model.tar"}, 94.0)
    assert titles(runs)[0] == "Students with data"


def test_the_runs_of_an_audit_are_one_collection(tmp_path):
    audit, teacher = tmp_path / "audit", tmp_path / "normal"
    write(teacher, SCRATCH | {"model_name": "net"}, 90.0)
    audit.mkdir()
    (audit / "params.json").write_text('{"checkpoint": "normal"}')
    runs = audit / "runs/net/all"
    write(runs / "alone/labels", SCRATCH | {"model_name": "net"}, 60.0)
    write(runs / "alone/label_smoothing_0.1", SCRATCH | {"model_name": "net", "label_smoothing": 0.1}, 61.0)
    write(runs / "unlabeled/logits/hard_label", SCRATCH | {
        "model_name": "net", "teacher_model": "net", "attack": "hard_label", "labels": 0, "queries": "once",
        "teacher_resume": f"{teacher}/last_model.tar"}, 70.0)
    table, = report(audit).tables
    assert [line[0] for line in table.lines()[1:]] == [
        "no teacher: labels", "no teacher: label smoothing 0.1", "Hard label"]
    for run in ("a", "b"):
        write(tmp_path / "run/runs" / run / "one", SCRATCH | {"model_name": "net"}, 60.0)
    write(tmp_path / "run", SCRATCH | {"model_name": "net"}, 60.0)  # no audit
    assert len(report(tmp_path / "run/runs").collections) == 2


class TestAttacks:
    """Attacks on a normal and on a nasty teacher, with and without labels."""

    @pytest.fixture
    def root(self, tmp_path):
        normal, nasty = teachers(tmp_path)
        once = {"queries": "once", "teacher_cache": 1}
        write(tmp_path / "attacks/alone/smoothed", SCRATCH | {"model_name": "net", "label_smoothing": 0.1}, 86.5)
        for kind, teacher, value in (("normal", normal, 85.0), ("nasty", nasty, 83.0)):
            place = tmp_path / f"attacks/{kind}"
            write(place / "labels/kd_t1", student(teacher, temperature=1, **once), value)
            write(place / "labels/kd_t20", student(teacher, temperature=20, **once), value - 50 * (kind == "nasty"))
            write(place / "labels/htc", student(teacher, attack="htc", temperature=50, **once), value + 2)
            for name, temperature in (("kd_t1", 1), ("kd_t20", 20)):
                write(place / "no_labels" / name, student(teacher, temperature=temperature, labels=0, alpha=1, **once),
                      value - 1 - 50 * (kind == "nasty" and temperature == 20))
            write(place / "no_labels/label", student(teacher, labels=0, alpha=1, interface="label", **once), 80.0)
        control = student(normal, attack="uniform", of="htc", of_parameters={"temperature": 50.0}, **once)
        del control["alpha"], control["temperature"]
        write(tmp_path / "attacks/controls/htc_uniform", control, 86.9)
        write(tmp_path / "ablations/scm/link", student(nasty, **once), 81.0)
        last = student(tmp_path / "ablations/scm/link", attack="scm_chain", teacher_model="net", **once)
        write(tmp_path / "attacks/nasty/labels/scm_chain", last, 80.0)
        return tmp_path

    def test_attacks_are_listed_by_teacher_with_baselines_and_controls(self, root):
        found = rows(root, "Attacks, CIFAR-10, student CNN, labels")
        assert found["the teacher itself", "last epoch"]["nasty ResNet-18"] == "94.00"
        assert found["no teacher: labels", "last epoch"]["nasty ResNet-18"] == "86.00"
        assert found["no teacher: label smoothing 0.1", "last epoch"]["normal ResNet-18"] == "86.50"
        assert found["KD, temperature 1", "last epoch"]["nasty ResNet-18"] == "83.00 (-3.00)"
        assert found["HTC", "last epoch"] == {"normal ResNet-18": "87.00 (+1.00)", "nasty ResNet-18": "85.00 (-1.00)",
                                              "Uniform control": "86.90 (+0.90)"}

    def test_the_last_student_of_a_chain_is_an_attack_on_the_first_teacher(self, root):
        found = rows(root, "Attacks, CIFAR-10, student CNN, labels")
        assert found["SCM chain", "last epoch"]["nasty ResNet-18"] == "80.00 (-6.00)"

    def test_attacks_without_labels_have_their_own_table(self, root):
        found = rows(root, "Attacks, CIFAR-10, student CNN, no labels")
        assert found["KD, temperature 4, label", "last epoch"]["normal ResNet-18"] == "80.00 (-6.00)"

    def summary(self, root, thief):
        title = f"Attacks, CIFAR-10, student CNN, {thief}"
        table = next(table for table in report(root).tables if table.title.startswith(title))
        return table.notes, {line[0]: line[1:] for line in table.summary}

    def test_the_strongest_on_each_teacher_is_named(self, root):
        notes, lines = self.summary(root, "labels")
        assert lines["nasty ResNet-18"][:2] == ["HTC", "85.00"] and len(notes) == 1
        assert "| strongest attack " in report(root).text()

    def test_a_defense_is_measured_by_the_headroom_above_hard_labels(self, root):
        """Normal: 84 with T = 1, 80 with hard labels. Nasty: 82. The defense takes half of the headroom of 4 points."""
        notes, lines = self.summary(root, "no labels")
        assert notes == ["Headroom above the floor: 4.00 points."]
        assert lines["nasty ResNet-18"] == ["KD, temperature 1", "82.00", "80.00", "0.50"]

    def test_without_headroom_there_is_no_efficiency(self, root):
        params = student(root / "baseline/resnet18", attack="hard_label", alpha=1, labels=0, queries="once")
        del params["temperature"]
        write(root / "attacks/normal/no_labels/hard", params, 90.0)
        assert self.summary(root, "no labels")[1]["nasty ResNet-18"][-1] == "no headroom"

    def test_an_answer_defense_is_a_column_of_its_own(self, root):
        write(root / "attacks/mad", student(root / "baseline/resnet18", temperature=1, alpha=1, labels=0,
                                            answer_defense="mad:0.5", queries="once"), 81.0)
        found = rows(root, "Attacks, CIFAR-10, student CNN, no labels")
        assert found["KD, temperature 1", "last epoch"]["normal ResNet-18, mad:0.5"] == "81.00 (-5.00)"

    def test_attacks_do_not_change_the_published_table(self, root):
        found = rows(root)
        assert found["nasty ResNet-18", "last epoch"]["CNN"] == "82.00 (-4.00)"
        assert not [row for row, _ in found if "smoothed" in row]

    def test_many_teachers_are_rows(self, root):
        for number in range(7):
            write(root / f"attacks/mad{number}", student(
                root / "baseline/resnet18", temperature=1, alpha=1, labels=0, answer_defense=f"mad:0.{number + 1}",
                queries="once"), 80.0 + number)
        found = rows(root, "Attacks, CIFAR-10, student CNN, no labels")
        assert found["normal ResNet-18, mad:0.3", "last epoch"]["KD, temperature 1"] == "82.00 (-4.00)"
        assert found["normal ResNet-18", "last epoch"]["no teacher: labels"] == "86.00"
        files, failures = report(root).write(root / "out")
        assert not failures and "attacks-cifar10-net-no-labels.png" in {file.name for file in files}

    def test_two_ways_to_query_are_two_rows_and_no_defense(self, root):
        write(root / "attacks/views", student(root / "baseline/resnet18", temperature=1, alpha=1, labels=0), 84.5)
        found = rows(root, "Attacks, CIFAR-10, student CNN, no labels")
        assert found["KD, temperature 1, queries views", "last epoch"]["normal ResNet-18"] == "84.50 (-1.50)"
        assert set(self.summary(root, "no labels")[1]) == {"teacher", "normal ResNet-18", "nasty ResNet-18"}

    def test_attack_tables_are_drawn(self, root):
        files, failures = report(root).write(root / "out")
        assert not failures
        assert {"attacks-cifar10-net-labels.png", "attacks-cifar10-net-no-labels.png"} <= {file.name for file in files}

    def test_students_of_different_numbers_of_images_are_a_sweep(self, root):
        for budget, value in ((100, 40.0), (1000, 60.0), (5000, 70.0)):
            for kind in ("normal", "nasty"):
                teacher = root / ("baseline/resnet18" if kind == "normal" else "kd_nasty_resnet18/nasty_resnet18")
                write(root / f"ablations/query_budget/{kind}_{budget}", student(
                    teacher, labels=0, alpha=1, queries="once", query_budget=budget, num_epochs=budget), value)
        sweep, = (sweep for sweep in report(root).sweeps if sweep.key == "query_budget")
        assert {line[0]: line[1:] for line in sweep.table()} == {
            "": ["100", "1000", "5000"], "normal teacher, KD, no labels": ["40.00", "60.00", "70.00"],
            "nasty teacher, KD, no labels": ["40.00", "60.00", "70.00"]}
