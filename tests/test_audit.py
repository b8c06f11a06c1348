"""The command audit.py: bad input, and whole audits, including interrupted ones."""
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FEW, ROOT, all_end, command, environment, refused, results

from audits.plan import plan
from audits.result import Audit
from model import build_model
from runs.directories import find, is_audit
from runs.stages import AUDIT
from utils.params import check_params
from utils.run_directory import RunDirectory

# Input that is refused before training

@pytest.fixture
def constant(tmp_path):
    """Weights of a small net that predicts class 0 of 3 for every image."""
    network = build_model("net", 3, num_channels=4)
    weights = {name: torch.zeros_like(value) if value.is_floating_point() else value
               for name, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "constant.pt")
    return str(tmp_path / "constant.pt")


def audit_directory(experiment, weights, name="audit", **values):
    return experiment(name, **{"checkpoint": str(weights), "attacks": ["hard_label"], "thieves": ["unlabeled"],
                               **values})


def test_a_network_hardly_above_chance_is_refused(experiment, constant, call):
    line = refused(call, "audit", audit_directory(experiment, constant))
    assert constant in line and "33.3 %" in line and '"mean" and "std"' in line


def test_a_network_with_another_class_count_is_refused(experiment, constant, call, data, tmp_path):
    shutil.copytree(data, tmp_path / "two", ignore=shutil.ignore_patterns("red"))
    line = refused(call, "audit", audit_directory(experiment, constant, dataset=f"folder:{tmp_path / 'two'}"))
    assert constant in line


@pytest.mark.parametrize(("values", "arguments", "words"), [
    ({"checkpoint": "nowhere"}, (), "nowhere"),
    ({"unprotected": "nowhere"}, (), "nowhere"),
    ({"thieves": ["nobody"]}, (), "nobody"),
    ({"interfaces": ["top_q:3"]}, (), "top_q"),
    ({"answer_defenses": ["mad"]}, (), "mad"),
    ({}, ("--jobs", "0"), "--jobs is 0"),
    ({}, ("--jobs", "-1"), "--jobs is -1"),
    ({}, ("--set", "thieves=[]"), '--set: "thieves"'),
    ({}, ("--set", "alpha=1"), 'unknown key "alpha"'),
])
def test_bad_input_is_one_line_and_nothing_is_written(experiment, constant, call, monkeypatch, values, arguments,
                                                      words):
    monkeypatch.setattr("audits.model.chance_threshold", lambda _: 0.0)
    line = refused(call, "audit", audit_directory(experiment, constant, **values), *arguments)
    assert words in line


def test_two_audits_cannot_share_a_directory(experiment, constant, call):
    directory = audit_directory(experiment, constant)
    lock = RunDirectory(directory)
    lock.lock()
    assert f"another audit is running in {directory}" in refused(call, "audit", directory)


def test_a_directory_without_a_finished_audit_cannot_be_compared(tmp_path, call):
    (tmp_path / "audit.json").write_text("{}")
    for directory, words in ((tmp_path, "damaged"), (tmp_path / "none", "does not exist")):
        done = call("audit", tmp_path, "--compare", directory)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_audit_is_no_run_but_its_runs_are_found(experiment, constant, tmp_path):
    directory = audit_directory(experiment, constant)
    made = plan(check_params(json.loads((directory / "params.json").read_text()), directory, AUDIT, {}), directory,
                {json.loads((directory / "params.json").read_text())["dataset"]: 45})
    for attempt in made.attempts:
        attempt.write(0)
    assert is_audit(directory / "params.json")
    runs, remarks = find([tmp_path])
    assert not remarks and {run.directory for run in runs} == set(made.directories())
    done = subprocess.run([sys.executable, str(ROOT / "scripts/run_all.py"), str(tmp_path), "--dry_run"],
                          capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("python")]
    assert sorted(line.rpartition(" ")[2] for line in commands) == sorted(map(str, made.directories()))


# Whole audits

SMALL = {"attacks": ["hard_label"], "thieves": ["unlabeled"]}  # 4 students, 3 of them without a teacher


def write(directory, data, **values):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(
        {"model_name": "net", "dataset": f"folder:{data}", **FEW, **values}))
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data):
    directory = write(tmp_path_factory.mktemp("audits") / "teacher", data, learning_rate=0.01, num_epochs=4)
    subprocess.run(command("train_scratch", directory), env=environment(), capture_output=True, check=True)
    return directory


@pytest.fixture(scope="module")
def audited(teacher, data):
    """Directory of a finished audit, and its output."""
    directory = write(teacher.parent / "audited", data, checkpoint=str(teacher), attacks=["kd", "hard_label"])
    done = subprocess.run(command("audit", directory), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


@pytest.fixture
def audit(call, monkeypatch):
    """`audit(directory, ...)` runs an audit; students are forked from one process, shared by all tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda directory, *arguments: call("audit", directory, *arguments)


def found_in(directory):
    return Audit.model_validate_json((directory / "audit.json").read_text())


def times(directory):
    """Time at which each run finished."""
    return {file.parent.relative_to(directory): file.stat().st_mtime_ns for file in directory.rglob("results.json")}


def everything(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def without_place(directory):
    """Verdicts and students of a finished audit, independent of its directory."""
    found = json.loads((directory / "audit.json").read_text().replace(str(directory), "DIR"))
    return found["finished"], found["verdicts"], found["students"]


def start(directory, *arguments):
    return subprocess.Popen(command("audit", directory, *arguments), env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_finished_audit_has_all_its_files_and_a_short_report(audited):
    directory, printed = audited
    names = {path.name for path in directory.iterdir()}
    assert names == {"params.json", "runs", "audit.md", "audit.json", "audit.csv", "attacks_net4_labeled.png",
                     "attacks_net4_unlabeled.png"}
    report = printed[printed.index(f"{directory.parent / 'teacher'}: net"):]
    assert len(report.splitlines()) <= 40 and "secur" not in (directory / "audit.md").read_text().lower()
    found = found_in(directory)
    assert found.finished and not found.failed and found.runs == len(times(directory)) == 9
    for verdict in found.verdicts:
        assert verdict.sentence in (directory / "audit.md").read_text()


@pytest.mark.slow
def test_each_accuracy_is_that_of_the_run_it_names(audited):
    directory, _ = audited
    named = set()
    for each in found_in(directory).students:
        for seed, accuracy in each.accuracy.seeds.items():
            run = Path(each.accuracy.directory) / f"seed{seed}"
            assert accuracy == results(run)["last"]["test_accuracy"]
            named.add(run.relative_to(directory))
    assert named == set(times(directory))
    with open(directory / "audit.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(named)
    for line in lines:
        record = results(Path(line["directory"]))
        assert float(line["test_accuracy"]) == record["last"]["test_accuracy"]
        assert line["command"] == f"python {record['stage']} --save_path {line['directory']}"


@pytest.mark.slow
def test_audit_json_matches_its_schema(audited, call):
    schema = json.loads(call("audit", "", "--schema").stdout)
    text = (audited[0] / "audit.json").read_text()
    assert Audit.model_validate_json(text).model_dump_json(indent=1) + "\n" == text
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.slow
def test_a_finished_audit_trains_and_changes_nothing(audited, audit):
    directory, printed = audited
    before, found = times(directory), without_place(directory)
    again = audit(directory)
    assert again.returncode == 0, again.stderr
    assert times(directory) == before and without_place(directory) == found
    assert again.stdout == printed[printed.index(f"{directory.parent / 'teacher'}: net"):]


@pytest.mark.slow
def test_report_reads_the_runs_of_an_audit(audited, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "report.py"), str(audited[0]), "--out", str(tmp_path)],
                          capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "remark" not in done.stdout and "Hard label" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_an_audit_of_another_interface_reuses_the_unprotected_students(audited, audit, data, teacher, call):
    """`unprotected` gives equal results as an audit and as a checkpoint."""
    unlabeled = "thieves=[\"unlabeled\"]"
    values = {"checkpoint": str(teacher), "attacks": ["kd", "hard_label"], "interfaces": ["label"]}
    by_audit = write(teacher.parent / "by_audit", data, **values, unprotected=str(audited[0]))
    by_checkpoint = write(teacher.parent / "by_checkpoint", data, **values, unprotected=str(teacher))
    before = times(audited[0])
    for directory in (by_audit, by_checkpoint):
        done = audit(directory, "--set", unlabeled)
        assert done.returncode == 0, done.stderr
    assert times(audited[0]) == before and len(times(by_audit)) == 2 and len(times(by_checkpoint)) == 7
    one, two = (found_in(directory) for directory in (by_audit, by_checkpoint))
    for found in (one, two):
        verdict, = found.verdicts
        assert verdict.answers == "label" and verdict.unprotected is not None and verdict.headroom_left == 0
        assert found.unprotected == found.model
    assert one.prices == two.prices and set(one.prices) == {"logits", "label", "unprotected"}

    def numbers(verdict):
        return {key: value["seeds"] if isinstance(value, dict) else value
                for key, value in verdict.model_dump().items()}
    assert numbers(one.verdicts[0]) == numbers(two.verdicts[0])
    compared = audit(by_audit, "--compare", audited[0], by_audit)
    heads = compared.stdout.splitlines()[0]
    assert compared.returncode == 0 and str(audited[0]) in heads and str(by_audit) in heads
    assert "price: accuracy, %" in compared.stdout
    assert "num_epochs (2 -> 3)" in refused(call, "audit", by_audit, "--set", unlabeled, "num_epochs=3")
    write(by_audit, data, **values, unprotected=str(audited[0]), batch_size=4)
    assert "differs in batch_size" in refused(call, "audit", by_audit, "--set", unlabeled)


@pytest.mark.slow
def test_lay_out_dry_run_and_restart(audit, data, teacher, tmp_path, call):
    directory = write(tmp_path / "audit", data, checkpoint=str(teacher), **SMALL)
    before = everything(directory)
    dry = audit(directory, "--dry_run")
    assert dry.returncode == 0 and "\n4 students, 0 of them finished; the time" in dry.stdout
    assert re.match(r"accuracy of the model: \d+\.\d\d % of \d+ test images\n", dry.stdout)
    assert everything(directory) == before

    assert "4 runs" in audit(directory, "--lay_out").stdout
    runs = sorted(file.parent for file in directory.rglob("runs/**/params.json"))
    assert len(runs) == 4 and not times(directory)
    labels = directory / "runs/net4/all/alone/labels/seed0"
    assert call("train_scratch", labels).returncode == 0
    before = everything(directory)
    running = RunDirectory(directory)
    running.lock()
    assert "another audit is running" in refused(call, "audit", directory)
    dry = audit(directory, "--dry_run")
    running.unlock()
    assert re.search(r"^4 students, 1 of them finished; about \d+ s for the others", dry.stdout, re.MULTILINE)
    assert everything(directory) == before

    finished = times(directory)
    smoothed = directory / "runs/net4/all/alone/label_smoothing_0.1/seed0"
    lock = RunDirectory(smoothed)
    lock.lock()
    done = audit(directory)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"1 of 4 runs are not finished: {smoothed}" in done.stderr and "another process is training" in done.stdout
    assert not found_in(directory).finished and found_in(directory).failed == [str(smoothed)]
    assert "NOT FINISHED" in done.stdout and str(smoothed) in (directory / "audit.md").read_text()
    lock.unlock()
    assert audit(directory).returncode == 0
    assert found_in(directory).finished and len(times(directory)) == 4 and finished.items() <= times(directory).items()

    before = everything(directory)
    for change in ("num_epochs=1", "learning_rate=0.1"):
        line = refused(call, "audit", directory, "--set", change)
        assert change.partition("=")[0] in line and "--restart" in line
        assert everything(directory) == before
    again = audit(directory, "--restart", "--set", "num_epochs=1")
    assert again.returncode == 0, again.stderr
    assert {results(run)["last"]["epoch"] for run in runs} == {1}


@pytest.mark.slow
def test_students_of_weights_that_have_changed_are_refused(audit, data, teacher, tmp_path):
    weights = tmp_path / "weights.tar"
    shutil.copy(teacher / "last_model.tar", weights)
    directory = write(tmp_path / "audit", data, checkpoint=str(weights), **SMALL)
    assert audit(directory).returncode == 0
    content = torch.load(weights, weights_only=True)
    next(iter(content["state_dict"].values())).mul_(1.001)
    torch.save(content, weights)
    done = audit(directory)
    assert done.returncode == 2 and f"{weights} has changed" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_students_of_images_that_have_changed_are_refused(audit, data, teacher, tmp_path):
    images = shutil.copytree(data, tmp_path / "images")
    directory = write(tmp_path / "audit", images, checkpoint=str(teacher), **SMALL)
    assert audit(directory).returncode == 0
    next((images / "train").rglob("*.png")).unlink()
    done = audit(directory, "--dry_run")
    assert done.returncode == 2 and "the data have changed" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_audit_repeats_no_run_and_has_the_same_result(audited, audit, data, teacher, tmp_path):
    directory = write(tmp_path / "audit", data, checkpoint=str(teacher), attacks=["kd", "hard_label"])
    moments = random.Random(0)
    finished = {}
    for count in (0, 3):
        process = start(directory, "--jobs", 2)
        while len(times(directory)) < count or not list(directory.rglob("training.log")):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(moments.random() / 4)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert all_end(process.pid), "children outlive the audit"
        now = times(directory)
        assert finished.items() <= now.items()
        finished = now
    done = audit(directory)
    assert done.returncode == 0, done.stderr
    assert finished.items() <= times(directory).items() and without_place(directory) == without_place(audited[0])


@pytest.mark.slow
def test_an_interrupt_ends_the_audit_and_its_students(data, teacher, tmp_path, call):
    directory = write(tmp_path / "audit", data, checkpoint=str(teacher), **SMALL, num_epochs=10_000)
    process = start(directory, "--jobs", 2)
    wait_for(process, lambda: len(list(directory.rglob("metrics.csv"))) == 2)
    assert refused(call, "audit", directory) == f"error: another audit is running in {directory}"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + error and "failed" not in out
    assert error.splitlines()[-1].startswith("interrupted") and all_end(process.pid)
