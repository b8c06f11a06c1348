"""Reports: seeds are one cell, published values are below, and damaged files do not stop a report."""
import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from report import report as print_report
from reports import figures
from reports.cells import network_display_name
from reports.document import Report
from reports.table import markdown
from utils.cli import main

SCRATCH = {"dataset": "cifar10", "learning_rate": 0.1, "num_epochs": 2}
STAGES = {"method": "train_datafree.py", "teacher_model": "train_kd.py", "adversarial_model": "train_nasty.py",
          "trigger": "train_poisoned.py"}


def write(directory, params, last=None, best=None, **rates):
    """Write an experiment, finished if an accuracy is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    if last is None:
        return
    rows = {name: {"epoch": epoch, "test_accuracy": value, **rates}
            for name, epoch, value in (("last", 2, last), ("best", 1, best or last))}
    stage = next((stage for key, stage in STAGES.items() if key in params), "train_scratch.py")
    (directory / "results.json").write_text(json.dumps({"stage": stage, "params": params, "set": {}, **rows}))
    (directory / "metrics.csv").write_text(f"epoch,test_accuracy\n1,{best or last}\n2,{last}\n")


def teachers(root):
    """Write a normal and a nasty ResNet-18, a baseline, and students of both below `root`."""
    normal, nasty = root / "baseline/resnet18", root / "kd_nasty_resnet18/nasty_resnet18"
    write(normal, SCRATCH | {"model_name": "resnet18"}, 95.0, 95.2)
    write(root / "baseline/cnn", SCRATCH | {"model_name": "net"}, 86.0, 86.5)
    write(nasty, SCRATCH | {"model_name": "resnet18", "adversarial_model": "resnet18", "temperature": 4, "weight": 0.04,
                            "adversarial_resume": f"{normal}/best_model.tar"}, 94.0)
    for kind, teacher, value in (("normal", normal, 87.0), ("nasty", nasty, 82.0)):
        write(root / f"kd_{kind}_resnet18/cnn", student(teacher), value)
    return normal, nasty


def student(teacher, **params):
    return SCRATCH | {"model_name": "net", "teacher_model": "resnet18", "temperature": 4, "alpha": 0.9,
                      "teacher_resume": f"{teacher}/best_model.tar"} | params


def report(*roots):
    return Report.of(roots)


def rows(root, title="Students with data"):
    """Lines of a table as {(row, name of the values): {column: text}}."""
    table = next(table for table in report(root).tables if table.title.startswith(title))
    heads, *lines = table.lines()
    found, row = {}, ""
    for line in lines:
        row = line[0] or row
        found[row, line[1]] = dict(zip(heads[2:], line[2:], strict=True))
    return found


def test_a_table_has_the_shape_of_the_papers_with_the_published_values_below(tmp_path):
    teachers(tmp_path)
    found = rows(tmp_path)
    assert "Attack success rate" not in report(tmp_path).text()
    assert found["no teacher", "last epoch"]["CNN"] == "86.00"
    assert found["no teacher", "best epoch"]["CNN"] == "86.50"
    assert found["normal ResNet-18", "last epoch"] == {
        "teacher": "95.00", "CNN": "87.00 (+1.00)", "ResNetC-20": "", "ResNetC-32": "", "ResNet-18": ""}
    assert found["nasty ResNet-18", "last epoch"]["teacher"] == "94.00 (-1.00)"
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "82.00 (-4.00)"
    assert found["nasty ResNet-18", "best epoch"]["CNN"] == "82.00 (-4.50)"
    assert found["nasty ResNet-18", "paper, unchecked"]["CNN"] == "82.46 (-4.18)"
    assert found["nasty ResNet-18", "paper, unchecked"]["teacher"] == "94.56 (-0.57)"


def test_seeds_are_one_cell(tmp_path):
    teachers(tmp_path)
    write(tmp_path / "baseline/cnn/seed1", SCRATCH | {"model_name": "net", "seed": 1}, 88.0)
    assert rows(tmp_path)["no teacher", "last epoch"]["CNN"] == "87.00 ± 1.41"


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_both_have(tmp_path):
    _, nasty = teachers(tmp_path)
    for seed, baseline, value in ((1, 66.0, 60.0), (2, 66.0, None)):
        write(tmp_path / f"baseline/cnn/seed{seed}", SCRATCH | {"model_name": "net", "seed": seed}, baseline)
        if value:
            write(tmp_path / f"kd_nasty_resnet18/cnn/seed{seed}", student(nasty, seed=seed), value)
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "71.00 ± 15.56 (-5.00 ± 1.41)"
    assert found["normal ResNet-18", "last epoch"]["CNN"] == "87.00 (+1.00)"
    (tmp_path / "baseline/cnn/seed1/results.json").unlink()
    found = rows(tmp_path)
    assert found["no teacher", "last epoch"]["CNN"] == "76.00 ± 14.14, 2 of 3 seeds"
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "71.00 ± 15.56 (-4.00, 1 of 2 seeds)"


def test_runs_that_are_no_seeds_of_their_parent_are_left_out_and_named(tmp_path):
    teachers(tmp_path)
    for number, params in enumerate(({"seed": 1, "num_epochs": 1}, {"seed": 0}, {"seed": 3, "model_name": "mlp"})):
        write(tmp_path / f"baseline/cnn/seed{number + 1}", SCRATCH | {"model_name": "net"} | params, 10.0)
    write(tmp_path / "kd_normal_resnet18/cnn/seed1",
          student(tmp_path / "kd_nasty_resnet18/nasty_resnet18", seed=1), 10.0)
    assert rows(tmp_path)["no teacher", "last epoch"]["CNN"] == "86.00"
    remarks = "\n".join(report(tmp_path).warnings)
    for words in ("cnn/seed1: left out, it differs from", "in num_epochs", "seed2: left out, it has the seed of",
                  "in model_name", "in teacher_resume"):
        assert words in remarks, words


def test_seeds_may_set_the_precision_that_auto_chose_for_others(tmp_path):
    params = SCRATCH | {"model_name": "net"}
    for name, precision, arithmetic, accuracy in (("", "auto", "float32", 60.0), ("seed1", "fp32", "float32", 62.0),
                                                  ("seed2", "bf16", "bfloat16", 10.0)):
        directory, seed = tmp_path / "baseline/cnn" / name, int(name[4:] or 0)
        write(directory, params | {"precision": precision, "seed": seed}, accuracy)
        results = json.loads((directory / "results.json").read_text())
        (directory / "results.json").write_text(json.dumps(results | {"precision": arithmetic}))
    assert rows(tmp_path)["no teacher", "last epoch"]["CNN"] == "61.00 ± 1.41"
    warning, = report(tmp_path).warnings
    assert "seed2: left out" in warning and warning.endswith("in precision")


def test_doubtful_runs_are_warned_about(tmp_path):
    normal, nasty = teachers(tmp_path)
    write(normal / "seed1", SCRATCH | {"model_name": "resnet18", "seed": 1}, 95.0)
    write(tmp_path / "kd_normal_resnet18/cnn/seed1", student(normal, seed=1), 87.0)
    (nasty / "params.json").write_text((nasty / "params.json").read_text().replace("0.04", "0.4"))
    read = tmp_path / "kd_nasty_resnet18/cnn/results.json"
    results = json.loads(read.read_text())
    read.write_text(json.dumps(results | {"checkpoints_read": {"teacher": {"path": f"{nasty}/best_model.tar",
                                                                           "sha256": "0"}}}))
    os.utime(read, (0, 0))
    (nasty / "best_model.tar").write_bytes(b"another")
    remarks = "\n".join(report(tmp_path).warnings)
    assert f"{tmp_path}/kd_normal_resnet18/cnn/seed1: its teacher is {normal}, of another seed" in remarks
    assert f"{nasty}: params.json was changed since it was run (weight (0.04 -> 0.4))" in remarks
    assert f"{tmp_path}/kd_nasty_resnet18/cnn: {nasty}/best_model.tar has changed" in remarks


def test_students_of_two_teachers_of_one_network_in_one_directory_have_a_row_each(tmp_path):
    _, nasty = teachers(tmp_path)
    write(tmp_path / "kd_nasty_resnet18/nasty_b", json.loads((nasty / "params.json").read_text()), 60.0)
    write(tmp_path / "kd_nasty_resnet18/cnn_b", student(tmp_path / "kd_nasty_resnet18/nasty_b"), 50.0)
    found = rows(tmp_path)
    heads = [head for head, what in found if head.startswith("nasty") and what == "last epoch"]
    assert [(found[head, "last epoch"]["teacher"], found[head, "last epoch"]["CNN"]) for head in heads] == [
        ("60.00 (-35.00)", "50.00 (-36.00)"), ("94.00 (-1.00)", "82.00 (-4.00)")]
    assert heads[0].endswith("from nasty_b") and heads[1].endswith("from nasty_resnet18")


def test_the_paper_compares_a_student_like_its_teacher_with_the_teacher(tmp_path):
    write(tmp_path / "baseline/resnet50", SCRATCH | {"dataset": "cifar100", "model_name": "resnet50"}, 77.0)
    write(tmp_path / "kd_normal_resnet50/resnet50", student(
        tmp_path / "baseline/resnet50", dataset="cifar100", model_name="resnet50", teacher_model="resnet50"), 79.0)
    found = rows(tmp_path)
    own = "the teacher's own network"
    assert found["normal ResNet-50", "last epoch"][own] == "79.00 (+2.00)"
    assert found["normal ResNet-50", "paper, unchecked"][own] == "80.02 (+1.90)"
    assert found["nasty ResNeXt-29", "paper, unchecked"][own] == "75.08 (-6.77)"


def test_two_nasty_teachers_of_one_network_have_a_row_each(tmp_path):
    normal, _ = teachers(tmp_path)
    weak = tmp_path / "kd_nasty_weak/nasty_weak"
    write(weak, SCRATCH | {"model_name": "resnet18", "adversarial_model": "resnet18", "temperature": 4, "weight": 0.004,
                           "adversarial_resume": f"{normal}/best_model.tar"}, 94.5)
    write(tmp_path / "kd_nasty_weak/cnn", student(weak), 85.0)
    found = rows(tmp_path)
    assert found["nasty ResNet-18, kd_nasty_weak", "last epoch"]["CNN"] == "85.00 (-1.00)"
    assert found["nasty ResNet-18, kd_nasty_resnet18", "last epoch"]["CNN"] == "82.00 (-4.00)"


def test_students_of_one_teacher_in_two_directories_have_a_row_each(tmp_path):
    normal, _ = teachers(tmp_path)
    write(tmp_path / "kd_normal_hot/cnn", student(normal, temperature=20), 85.0)
    found = rows(tmp_path)
    assert found["normal ResNet-18, kd_normal_hot", "last epoch"]["CNN"] == "85.00 (-1.00)"
    assert found["normal ResNet-18, kd_normal_resnet18", "last epoch"]["CNN"] == "87.00 (+1.00)"
    assert found["normal ResNet-18, kd_normal_hot", "last epoch"]["teacher"] == "95.00"
    assert ("normal ResNet-18, kd_normal_hot", "paper, unchecked") not in found
    assert found["normal ResNet-18, kd_normal_resnet18", "paper, unchecked"]["CNN"] == "87.75 (+1.11)"


def test_a_nasty_teacher_that_nobody_learned_from_stands_beside_the_normal_one(tmp_path):
    teachers(tmp_path)
    for name in ("kd_normal_resnet18", "kd_nasty_resnet18"):
        shutil.rmtree(tmp_path / name / "cnn")
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"]["teacher"] == "94.00 (-1.00)"
    assert found["no teacher", "last epoch"]["ResNet-18"] == "95.00"


def test_references_are_the_origin_and_the_baseline_with_the_same_recipe(tmp_path):
    teachers(tmp_path)
    write(tmp_path / "baseline/a_resnet18", SCRATCH | {"model_name": "resnet18"}, 60.0)
    write(tmp_path / "kd_normal_a/cnn", student(tmp_path / "baseline/a_resnet18"), 80.0)
    write(tmp_path / "baseline/a_cnn", SCRATCH | {"model_name": "net", "num_epochs": 1}, 40.0)
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"] | {"ResNet-18": ""} == {
        "teacher": "94.00 (-1.00)", "CNN": "82.00 (-4.00)", "ResNetC-20": "", "ResNetC-32": "", "ResNet-18": ""}


def test_collections_of_experiments_have_tables_of_their_own(tmp_path):
    teachers(tmp_path / "long")
    write(tmp_path / "short/baseline/cnn", SCRATCH | {"model_name": "net"}, 60.0)
    write(tmp_path / "short/kd/cnn", student(tmp_path / "long/baseline/resnet18"), 55.0)
    found = {table.title.rpartition("/")[2]: table.lines() for table in report(tmp_path).tables}
    assert set(found) == {"long", "short"}
    assert "60.00" not in str(found["long"]) and "86.00" not in str(found["short"])


def test_unfinished_runs_are_listed_with_their_commands(tmp_path):
    _, nasty = teachers(tmp_path)
    for directory in (nasty, tmp_path / "kd_nasty_resnet18/cnn"):
        (directory / "results.json").unlink()
    (tmp_path / "kd_nasty_resnet18/cnn/metrics.csv").unlink()
    told = report(tmp_path)
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"]["teacher"] == "epoch 2"
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "–"
    assert told.commands == [f"python train_nasty.py --save_path {nasty}",
                             f"python train_kd.py --save_path {tmp_path}/kd_nasty_resnet18/cnn"]
    assert all(command in told.markdown() for command in told.commands)


def test_many_unfinished_runs_have_one_command(tmp_path):
    teachers(tmp_path)
    for number in range(30):
        write(tmp_path / f"baseline/other{number}", SCRATCH | {"model_name": "net"})
    assert report(tmp_path).commands == [f"python scripts/run_all.py {tmp_path}"]


def test_a_teacher_or_student_of_which_nothing_has_started_is_in_no_table(tmp_path):
    """The demo's directories hold hundreds of runs, of which scripts/demo.sh makes a few."""
    normal, nasty = tmp_path / "baseline/mlp", tmp_path / "nasty"
    write(normal, SCRATCH | {"model_name": "mlp"}, 90.0)
    write(tmp_path / "baseline/net", SCRATCH | {"model_name": "net"}, 60.0)
    write(nasty, SCRATCH | {"model_name": "mlp", "adversarial_model": "mlp", "temperature": 4, "weight": 0.04,
                            "adversarial_resume": f"{normal}/best_model.tar"})
    for teacher in (normal, nasty):
        for attack in ("hard_label", "htc"):
            done = 70.0 if (teacher, attack) == (normal, "hard_label") else None
            write(tmp_path / f"attacks/{teacher.name}/{attack}", SCRATCH | {
                "model_name": "net", "teacher_model": "mlp", "attack": attack, "labels": 0, "queries": "once",
                "teacher_resume": f"{teacher}/last_model.tar"}, done)
        write(tmp_path / f"kd_{teacher.name}/ood", SCRATCH | {
            "method": "ood", "model_name": "net", "teacher_model": "mlp",
            "teacher_resume": f"{teacher}/last_model.tar"})
    found = {table.name.split()[0]: table for table in report(tmp_path).tables}
    assert set(found) == {"students", "attacks"}
    heads, *lines = found["attacks"].lines()
    assert heads[2:] == ["normal MLP"]
    assert [line[0] for line in lines] == ["the teacher itself", "no teacher: labels", "Hard label"]
    assert [column.label for column in found["students"].columns] == ["MLP", "CNN"]


def test_published_values_are_shown_before_anything_has_run(tmp_path):
    write(tmp_path / "baseline/resnet18", SCRATCH | {"model_name": "resnet18"})
    write(tmp_path / "baseline/resnet34", SCRATCH | {"model_name": "resnet34"})
    write(tmp_path / "kd_normal_resnet18/cnn", student(tmp_path / "baseline/resnet18"))
    write(tmp_path / "kd_normal_resnet34/dafl", {
        "dataset": "cifar10", "method": "dafl", "model_name": "resnet18", "teacher_model": "resnet34",
        "teacher_resume": f"{tmp_path}/baseline/resnet34/last_model.tar"})
    for title in ("Students with data", "Students without data"):
        assert any(name == "paper, unchecked" for _, name in rows(tmp_path, title)), title


def test_finished_networks_stay_in_a_table_before_the_first_attack(tmp_path):
    write(tmp_path / "baseline/net", SCRATCH | {"model_name": "net"}, 60.0)
    write(tmp_path / "baseline/smoothed", SCRATCH | {"model_name": "net", "label_smoothing": 0.1}, 61.0)
    write(tmp_path / "attacks/hard_label", SCRATCH | {
        "model_name": "net", "teacher_model": "net", "attack": "hard_label", "labels": 0, "queries": "once",
        "teacher_resume": f"{tmp_path}/baseline/net/last_model.tar"})
    assert not report(tmp_path).hidden


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
    table, = report(audit).tables  # none of the network without a teacher alone
    assert [line[0] for line in table.lines()[1:]] == [
        "no teacher: labels", "no teacher: label smoothing 0.1", "Hard label"]
    for run in ("a", "b"):
        write(tmp_path / "run/runs" / run / "one", SCRATCH | {"model_name": "net"}, 60.0)
    write(tmp_path / "run", SCRATCH | {"model_name": "net"}, 60.0)  # no audit
    assert len(report(tmp_path / "run/runs").collections) == 2


def test_backdoor_tables_show_accuracy_and_success_rate(tmp_path):
    teacher = tmp_path / "abd/badnet_grid/teacher"
    poisoned = SCRATCH | {"model_name": "wrn16_2", "trigger": "badnet_grid"}
    write(teacher, poisoned, 92.0, asr=99.5)
    write(tmp_path / "abd/clean", SCRATCH | {"model_name": "wrn16_2"}, 93.0)
    for name, defense in (("zskt", "none"), ("zskt_sv", "sv"), ("zskt_auto", "auto")):
        write(tmp_path / "abd/badnet_grid" / name,
              {"dataset": "cifar10", "method": "zskt", "model_name": "wrn16_1", "teacher_model": "wrn16_2",
               "teacher_resume": f"{teacher}/last_model.tar", "trigger": "badnet_grid", "backdoor_defense": defense},
              70.0, asr=5, base_rate=2, target_recall=80)
    results = json.loads((tmp_path / "abd/badnet_grid/zskt/results.json").read_text())
    (tmp_path / "abd/badnet_grid/zskt/results.json").write_text(json.dumps(
        results | {"details": {"reestimated_batch_norm": {"test_accuracy": 71.0, "asr": 6.0}}}))
    found = rows(tmp_path, "Backdoors, CIFAR-10, ZSKT from WRN-16-2 to WRN-16-1")
    assert found["badnet_grid", "last epoch"]["teacher"] == "92.00 / 99.50"
    assert found["badnet_grid", "last epoch"]["ZSKT + ABD"] == "70.00 / 5.00"
    assert found["badnet_grid", "paper, unchecked"]["ZSKT + ABD"] == "68.3 / 0.7"
    assert found["trojan_wm", "paper, unchecked"]["with data"] == "77.5 / 11.1"
    assert found["badnet_grid", "base rate / target recall"]["ZSKT"] == "2.00 / 80.00"
    assert found["badnet_grid", "re-estimated batch norm"]["ZSKT"] == "71.00 / 6.00"
    assert found["no backdoor", "last epoch"]["teacher"] == "93.00"
    assert "Attack success rate: " in report(tmp_path).text()


def test_continued_students_have_columns_that_name_each_training(tmp_path):
    poisoned = {"dataset": "demo", "model_name": "net", "trigger": "badnet_sq"}
    write(tmp_path / "teacher", poisoned | {"learning_rate": 0.1, "num_epochs": 2}, 92.0, asr=99.5)
    runs = {"plain": ("", "none"), "sr": ("", "sr"), "sr_plain": ("sr", "none"), "sv": ("", "sv"),
            "sv_sr": ("sv", "sv+sr"), "search": ("", "auto"), "published": ("", "auto")}
    for name, (start, defense) in runs.items():
        params = poisoned | {"method": "ood", "teacher_model": "net", "backdoor_defense": defense,
                             "teacher_resume": f"{tmp_path}/teacher/last_model.tar"}
        if start:
            params["init_from"] = f"{tmp_path}/{start}/last_model.tar"
        write(tmp_path / name, params | {"sv_fallback": 1} if name == "search" else params, 70.0, asr=5)
    assert list(rows(tmp_path, "Backdoors")["badnet_sq", "last epoch"]) == [
        "teacher", "OoD", "OoD + SV", "OoD + SR", "OoD + ABD", "OoD + searched SV", "OoD + SV, then SV + SR",
        "OoD + SR, then no defense"]


def test_a_clean_network_of_a_backdoor_table_stays_the_baseline_of_its_own_students(tmp_path):
    teachers(tmp_path)
    write(tmp_path / "abd/teacher", SCRATCH | {"model_name": "resnet18", "trigger": "badnet_grid"}, 90.0, asr=99.5)
    assert rows(tmp_path, "Backdoors")["no backdoor", "last epoch"]["teacher"] == "95.00"
    assert rows(tmp_path, "Students with data")["normal ResNet-18", "last epoch"]["teacher"] == "95.00"


def test_a_missing_rate_is_shown_as_missing(tmp_path):
    poisoned = SCRATCH | {"model_name": "wrn16_2", "trigger": "badnet_grid"}
    write(tmp_path / "abd/badnet_grid/teacher", poisoned, 92.0, target_recall=100)
    found = rows(tmp_path, "Backdoors")
    assert found["badnet_grid", "last epoch"]["teacher"] == "92.00 / n/a"
    assert found["badnet_grid", "base rate / target recall"]["teacher"] == "n/a / 100.00"


def test_two_teachers_with_one_trigger_have_a_row_each(tmp_path):
    for name, value in (("a", 92.0), ("b", 80.0), ("c", 70.0)):
        teacher = tmp_path / f"abd/{name}/teacher"
        write(teacher, SCRATCH | {"model_name": "wrn16_2", "trigger": "badnet_grid"}, value, asr=99.5)
        write(tmp_path / f"abd/{name}/zskt", {
            "dataset": "cifar10", "method": "zskt", "model_name": "wrn16_1", "teacher_model": "wrn16_2",
            "teacher_resume": f"{teacher}/last_model.tar", "trigger": "badnet_grid"}, value - 10, asr=5)
    found = rows(tmp_path, "Backdoors")
    for name, value in (("a", 92.0), ("b", 80.0), ("c", 70.0)):
        row = found[f"badnet_grid, {tmp_path}/abd/{name}/teacher", "last epoch"]
        assert row["teacher"] == f"{value:.2f} / 99.50" and row["ZSKT"] == f"{value - 10:.2f} / 5.00"
    assert found["badnet_grid", "paper, unchecked"]["teacher"] == "92.1 / 99.9"


def test_students_without_data_have_a_table_of_their_own(tmp_path):
    normal, _ = teachers(tmp_path)
    write(tmp_path / "kd_normal_resnet18/dafl", {
        "method": "dafl", "dataset": "cifar10", "model_name": "net", "teacher_model": "resnet18",
        "teacher_resume": f"{normal}/best_model.tar"}, 60.0)
    assert rows(tmp_path, "Students without")["normal ResNet-18", "last epoch"]["CNN, DAFL"] == "60.00 (-26.00)"


def test_another_attack_is_a_column_of_its_own(tmp_path):
    """The column is beside the default attack, and its reference is the same network without a teacher."""
    _, nasty = teachers(tmp_path)
    plain = student(nasty)
    del plain["alpha"]
    write(tmp_path / "kd_nasty_resnet18/cnn_dkd", plain | {"attack": "dkd", "beta": 2.0}, 84.0)
    write(tmp_path / "kd_nasty_resnet18/cnn_dkd/seed1", plain | {"attack": "dkd", "beta": 2.0, "seed": 1}, 86.0)
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "82.00 (-4.00)"
    assert found["nasty ResNet-18", "last epoch"]["CNN, DKD"] == "85.00 ± 1.41 (-2.00, 1 of 2 seeds)"
    assert found["no teacher", "last epoch"]["CNN, DKD"] == "86.00"
    assert found["nasty ResNet-18", "paper, unchecked"]["CNN, DKD"] == ""
    assert not [table for table in report(tmp_path).tables if table.title.startswith("Students without")]
    told = report(tmp_path)
    told.write(tmp_path / "out")
    with open(tmp_path / "out/results.csv") as file:
        lines = {(line["row"], line["column"]): line for line in csv.DictReader(file)}
    line = lines["nasty ResNet-18", "CNN, DKD"]
    assert (line["method"], line["kind"], line["teacher"], line["runs"]) == ("dkd", "student", "nasty resnet18", "2")


def test_another_interface_is_a_row_of_its_own_without_the_published_values(tmp_path):
    _, nasty = teachers(tmp_path)
    directory = tmp_path / "kd_nasty_resnet18/cnn_probabilities"
    write(directory, student(nasty, interface="probabilities"), 80.0)
    results = json.loads((directory / "results.json").read_text())
    (directory / "results.json").write_text(json.dumps(results | {"evaluated_before": {
        "teacher network, frozen": {"test_accuracy": 94.0}, "teacher as it answers (probabilities)": {
            "test_accuracy": 93.5}}}))  # not the network itself, but its answers to clients
    found = rows(tmp_path)
    row = "nasty ResNet-18, answers probabilities"
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "82.00 (-4.00)"
    assert found["nasty ResNet-18", "paper, unchecked"]["CNN"] == "82.46 (-4.18)"
    assert found[row, "last epoch"] == {"teacher": "93.50 (-1.50)", "CNN": "80.00 (-6.00)", "ResNetC-20": "",
                                        "ResNetC-32": "", "ResNet-18": ""}
    assert (row, "paper, unchecked") not in found
    report(tmp_path).write(tmp_path / "out")
    with open(tmp_path / "out/results.csv") as file:
        assert {(line["row"], line["answers"]) for line in csv.DictReader(file) if line["kind"] == "student"
                and line["teacher"].startswith("nasty")} == {("nasty ResNet-18", ""), (row, "probabilities")}


def test_attack_and_interface_together_are_a_cell_of_their_own(tmp_path):
    normal, _ = teachers(tmp_path)
    plain = student(normal, interface="probabilities", attack="dkd")
    del plain["alpha"]
    write(tmp_path / "kd_normal_resnet18/cnn_dkd", plain, 88.0)
    found = rows(tmp_path)
    assert found["normal ResNet-18, answers probabilities", "last epoch"]["CNN, DKD"] == "88.00 (+2.00)"
    assert found["normal ResNet-18, answers probabilities", "last epoch"]["CNN"] == ""
    assert found["normal ResNet-18", "last epoch"]["CNN, DKD"] == ""


class TestAttacks:
    """Tables of thefts: one row per attack, one column per teacher."""

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


def test_the_price_of_a_defended_teacher_is_shown_beside_the_normal_one(tmp_path):
    normal, nasty = teachers(tmp_path)
    write(tmp_path / "attacks/mad", student(normal, answer_defense="mad:0.5", interface="probabilities"), 80.0)
    for directory, entry, row in ((normal, "outputs", {"accuracy": 95.0, "cmi": 0.1}),
                                  (nasty, "outputs", {"accuracy": 94.0, "cmi": 0.4, "l1_change": 0.3}),
                                  (tmp_path / "attacks/mad", "answers", {"accuracy": 95.0, "l1_change": 0.5})):
        results = json.loads((directory / "results.json").read_text())
        (directory / "results.json").write_text(json.dumps(results | {"details": {entry: row}}))
    price, = report(tmp_path).prices
    assert price.lines() == [["", "accuracy, %", "L1 change", "CMI"],
                             ["normal ResNet-18", "95.00", "", "0.100"],
                             ["nasty ResNet-18", "94.00", "0.300", "0.400"],
                             ["normal ResNet-18, probabilities after mad:0.5", "95.00", "0.500", ""]]
    assert "Price and profile" in report(tmp_path).text() and "Price and profile" in report(tmp_path).markdown()


def test_two_defended_teachers_of_one_kind_have_a_price_each_and_baselines_have_none(tmp_path):
    normal, nasty = teachers(tmp_path)
    other = tmp_path / "kd_nasty_resnet18_0.1/nasty_resnet18"
    write(other, json.loads((nasty / "params.json").read_text()) | {"weight": 0.1}, 92.0)
    for directory in (normal, nasty, other, tmp_path / "baseline/cnn"):
        results = json.loads((directory / "results.json").read_text())
        (directory / "results.json").write_text(json.dumps(results | {"details": {"outputs": {"cmi": 0.1}}}))
    price, = report(tmp_path).prices
    assert [line[0] for line in price.lines()[1:]] == [
        "normal ResNet-18", "nasty ResNet-18, weight 0.04", "nasty ResNet-18, weight 0.1"]
    assert not report(tmp_path / "baseline").prices


def test_runs_that_differ_in_one_parameter_are_a_sweep(tmp_path):
    _, nasty = teachers(tmp_path)
    for number, alpha in enumerate((0.1, 0.5, 0.7)):
        write(tmp_path / f"ablations/alpha/{number}", student(nasty, alpha=alpha), 80.0 + number)
    sweep, = report(tmp_path).sweeps
    assert (sweep.key, sweep.network, list(sweep.lines)) == ("alpha", "net", ["nasty"])
    assert [value for value, _ in sweep.lines["nasty"]] == [0.1, 0.5, 0.7, 0.9]


def test_another_interface_and_another_attack_are_lines_of_their_own_in_a_sweep(tmp_path):
    _, nasty = teachers(tmp_path)
    for number, temperature in enumerate((2, 8, 20)):
        for name, changes in (("plain", {}), ("soft", {"interface": "probabilities"}), ("dkd", {"attack": "dkd"})):
            params = student(nasty, temperature=temperature) | changes
            if name == "dkd":
                del params["alpha"]
            write(tmp_path / f"ablations/{name}/{number}", params, 80.0 + number)
    sweep, = report(tmp_path).sweeps
    assert {line[0]: line[1:] for line in sweep.table()} == {
        "": ["2", "4", "8", "20"], "nasty teacher": ["80.00", "82.00", "81.00", "82.00"],
        "nasty teacher, answers probabilities": ["80.00", "", "81.00", "82.00"],
        "nasty teacher, DKD": ["80.00", "", "81.00", "82.00"]}


def test_runs_in_no_table_and_no_figure_are_named(tmp_path):
    _, nasty = teachers(tmp_path)
    write(tmp_path / "ablations/alpha/0.1/nasty_cnn", student(nasty, alpha=0.1), 80.0)
    write(tmp_path / "baseline/cnn_long", SCRATCH | {"model_name": "net", "num_epochs": 9}, 87.0)
    told = report(tmp_path)
    assert [cell.experiment.name for cell in told.hidden] == ["nasty_cnn", "cnn_long"]
    assert "ablations/alpha/0.1/nasty_cnn" in told.text()


def test_networks_have_the_names_of_the_papers():
    assert network_display_name("preresnet32") == "ResNetC-32" and network_display_name("net16") == "CNN, 16 channels"


def test_a_markdown_table_is_aligned():
    assert markdown([["a", "bcd"], ["ef", ""]]).splitlines() == ["| a  | bcd |", "|----|-----|", "| ef |     |"]


def call(*arguments, cwd):
    return subprocess.run([sys.executable, str(ROOT / "report.py"), *map(str, arguments)], capture_output=True,
                          text=True, cwd=cwd, env=environment())


def test_a_report_is_written_and_printed(tmp_path):
    teachers(tmp_path / "experiments")
    done = call(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "82.00 (-4.00)" in done.stdout and "5 of 5 runs are finished" in done.stdout
    text = (tmp_path / "report/report.md").read_text()
    assert "## Students with data, CIFAR-10" in text and "![curves-cifar10](curves-cifar10.png)" in text
    assert len(list((tmp_path / "report").glob("*.png"))) == 2
    with open(tmp_path / "report/results.csv") as file:
        lines = {(line["row"], line["column"]): line for line in csv.DictReader(file)}
    line = lines["nasty ResNet-18", "CNN"]
    assert (line["last_test_accuracy"], line["published"], line["finished"]) == ("82.0", "82.46", "1")
    assert line["experiment"] == "experiments/kd_nasty_resnet18/cnn"


def test_figures_have_distinct_file_names():
    texts = ["x-y", "x y", "X Y", "x_y", "x-y-2", "x y", "猫", "犬", "z" * 200, "z" * 200 + "!"]
    names = figures._file_names(f"students folder:{text}" for text in texts)
    assert len({name.lower() for name in names}) == len(texts)
    assert all(name.isascii() and len(name) <= 110 for name in names)
    assert names[:2] == ["students-folder-x-y", "students-folder-x-y-2"]


def test_names_are_drawn_literally(tmp_path):
    for name in ("_a$x_{", "b$\\frac$"):
        write(tmp_path / name, SCRATCH | {"model_name": "net", "dataset": "folder:$\\c_{"}, 80.0)
    told = report(tmp_path)
    figure = figures._training_curves("$\\c_{", told.cells)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        f"{tmp_path.name}/_a$x_{{", f"{tmp_path.name}/b$\\frac$"]
    assert not any(text.get_parse_math() for text in figure.findobj(lambda artist: hasattr(artist, "get_parse_math")))
    assert told.write(tmp_path / "out")[1] == []


@pytest.fixture
def printed(monkeypatch):
    """`printed(function, encoding)`: output on a terminal with an encoding, and exit status."""
    def run(function, encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", stream)
            main(function)
        stream.flush()
        return stream.buffer.getvalue().decode(encoding), end.value.code
    return run


def test_a_failed_figure_does_not_stop_the_report(tmp_path, monkeypatch, printed, capsys):
    def fail(_):
        raise ValueError("cannot draw this\nmore")

    teachers(tmp_path / "experiments")
    monkeypatch.setattr(figures, "_bar_plot", fail)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "experiments"), "--out", str(tmp_path / "out")])
    text, status = printed(print_report, "utf-8")
    assert "82.00 (-4.00)" in text and status == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out/students-cifar10.png was not drawn: cannot draw this\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "results.csv", "curves-cifar10.png"}
    assert "- " + str(tmp_path / "out/students-cifar10.png") in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(("encoding", "text"), [
    ("utf-8", "1 ± 2 – é 猫 \\udcb9"), ("cp1252", "1 ± 2 – é \\u732b \\udcb9"),
    ("latin-1", "1 ± 2 - é \\u732b \\udcb9"), ("ascii", "1 +- 2 - \\xe9 \\u732b \\udcb9")])
def test_characters_that_the_terminal_cannot_show_are_replaced(printed, encoding, text):
    assert printed(lambda: print("1 ± 2 – é 猫 \udcb9"), encoding) == (text + "\n", 0)


def test_a_directory_whose_name_is_not_utf8_is_reported(tmp_path):
    for name in ("a\udcb9", "b"):
        write(tmp_path / name / "baseline/net", SCRATCH | {"model_name": "net"}, 80.0)
        write(tmp_path / name / "baseline/_\udcb9", SCRATCH | {"model_name": "net", "num_epochs": 3}, 80.0)
    files, failures = report(tmp_path).write(tmp_path / "out")
    assert "a\\udcb9" in files[0].read_text(encoding="utf-8") and not failures


def test_a_history_that_a_spreadsheet_saved_is_read(tmp_path):
    write(tmp_path / "run", SCRATCH | {"model_name": "net"}, 80.0)
    (tmp_path / "run/metrics.csv").write_bytes(b"\xef\xbb\xbfepoch,test_accuracy\r\n1,70\r\n")
    told = report(tmp_path)
    assert told.runs[0].history == [{"epoch": 1, "test_accuracy": 70}] and not told.warnings


def test_a_finished_run_with_overrides_is_read(tmp_path):
    teachers(tmp_path)
    place = tmp_path / "baseline/cnn"
    results = json.loads((place / "results.json").read_text())
    (place / "results.json").write_text(json.dumps(results | {"set": {"model_name": "net"}}))
    (place / "params.json").write_text(json.dumps(SCRATCH))
    assert rows(tmp_path)["no teacher", "last epoch"]["CNN"] == "86.00"


def test_damaged_files_are_named_and_do_not_stop_the_report(tmp_path):
    teachers(tmp_path / "good")
    for name, file, content in (("json", "params.json", b"{"), ("text", "params.json", b"\xff\xfe\x00"),
                                ("list", "params.json", b"[]"), ("foreign", "params.json", b'{"lr": 0.1}')):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / file).write_bytes(content)
    for name, file, content in (("cut", "results.json", b'{"best": {'), ("other", "results.json", b'{"best": 3}'),
                                ("rows", "metrics.csv", b"epoch,test_accuracy\n1,80\n2,x\n"),
                                ("binary", "metrics.csv", b"\x00\xff\n\x00"),
                                ("short", "metrics.csv", b"epoch,test_accuracy,kl\n1,80\n"),
                                ("none", "results.json", b'{"stage": "train_scratch.py", "params": {}, '
                                 b'"best": {"epoch": 1, "test_accuracy": 8}, '
                                 b'"last": {"epoch": 1, "test_accuracy": 8}}'),
                                ("huge", "results.json", b'{"best": {"epoch": 1, "test_accuracy": 1' + b"0" * 400
                                 + b"}}"),
                                ("half", "results.json", b'{"device": "\\ud800"}'),
                                ("deep", "results.json", b"[" * 100_000)):
        write(tmp_path / "bad" / name, SCRATCH | {"model_name": "net"}, 80.0)
        (tmp_path / "bad" / name / file).write_bytes(content)
    (tmp_path / "bad/folder/params.json").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    done = call("good", "bad", "empty", "file", "nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "82.00 (-4.00)" in done.stdout
    for words in ("bad/json/params.json, line 1, column 2: not valid JSON", "bad/text/params.json is not a text file",
                  "bad/list/params.json: expected a JSON object", "bad/foreign/params.json is not of an experiment",
                  "bad/cut/results.json, line 1, column 11: not valid JSON", "bad/other/results.json",
                  "bad/rows/metrics.csv is damaged",
                  "bad/binary/metrics.csv is damaged", "bad/short/metrics.csv is damaged after 0 rows",
                  "bad/none/results.json has other parameters", "bad/deep/results.json: brackets are nested too deeply",
                  "bad/huge/results.json has no accuracy", "bad/half/results.json has half a surrogate pair",
                  "bad/folder/params.json: Is a directory", "empty: no params.json",
                  "file: is no directory", "nowhere: does not exist"):
        assert words in done.stdout, words


def test_a_reader_may_close_the_pipe_early(tmp_path):
    teachers(tmp_path)
    command = f"{sys.executable} {ROOT / 'report.py'} {tmp_path} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stderr) == (141, "")


def test_a_report_without_experiments_is_one_line(tmp_path):
    done = call("nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: nowhere: does not exist\n")
