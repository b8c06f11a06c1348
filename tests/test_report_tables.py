"""Tables of students and prices, and sweeps: seeds are one cell, published values are below."""
import csv
import json
import os
import shutil

from report_helpers import SCRATCH, report, rows, student, teachers, write


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


def test_students_without_data_have_a_table_of_their_own(tmp_path):
    normal, _ = teachers(tmp_path)
    write(tmp_path / "kd_normal_resnet18/dafl", {
        "method": "dafl", "dataset": "cifar10", "model_name": "net", "teacher_model": "resnet18",
        "teacher_resume": f"{normal}/best_model.tar"}, 60.0)
    assert rows(tmp_path, "Students without")["normal ResNet-18", "last epoch"]["CNN, DAFL"] == "60.00 (-26.00)"


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
