"""Tables of backdoors: accuracy and success rate by teacher and defense."""
import json

from report_helpers import SCRATCH, report, rows, teachers, write


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
