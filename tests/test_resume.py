"""A run that was stopped, killed or called again: the same numbers, nothing lost, nothing replaced unasked."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, environment, results

from utils import checkpoint

ALIKE = {"dropout_rate": 0.3}  # dropout too derives from the epoch


def state(directory, name="last_model.tar"):
    return checkpoint.load(directory / name).content


def assert_same_run(directory, other):
    """Weights, optimiser, history and metrics.csv of two runs are equal to the bit."""
    for name in ("last_model.tar", "best_model.tar"):
        one, two = state(directory, name), state(other, name)
        assert one["epoch"] == two["epoch"]
        assert one["history"] == two["history"]
        assert one["state_dict"].keys() == two["state_dict"].keys()
        assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
        for number, moments in one["optim_dict"]["state"].items():
            assert all(torch.equal(value, two["optim_dict"]["state"][number][key]) for key, value in moments.items())
    assert (directory / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert results(directory)["best"] == results(other)["best"]


def unfinished(call, directory, *arguments):
    """A run whose last act, writing results.json, did not happen."""
    assert call("train_scratch", directory, *arguments).returncode == 0
    (directory / "results.json").unlink()
    return directory


@pytest.mark.parametrize("model", [{"model_name": "net"}, {"model_name": "preresnet20", "learning_rate": 0.1}])
def test_two_epochs_and_two_more_are_four(call, experiment, model):
    whole, parts = (experiment(name, **ALIKE, **model, num_epochs=4, schedule=[3]) for name in ("whole", "parts"))
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", parts, "--set", "num_epochs=2").returncode == 0
    assert results(parts)["last"]["epoch"] == 2
    assert call("train_scratch", parts).returncode == 0
    assert_same_run(whole, parts)


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert path.exists()


def test_a_run_killed_in_the_middle_of_epochs_is_the_run_that_was_not(stage, experiment):
    whole, killed = (experiment(name, **ALIKE, num_epochs=60) for name in ("whole", "killed"))
    stage("train_scratch", whole)
    for delay in (0.05, 0.13):
        (killed / "last_model.tar").unlink(missing_ok=True)
        process = subprocess.Popen(command("train_scratch", killed, "--restart"), env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(killed / "last_model.tar", process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 1 <= state(killed)["epoch"] < 60
        assert not (killed / "results.json").exists()
        done = stage("train_scratch", killed)
        assert "continues after epoch" in done.stdout
        assert_same_run(whole, killed)


KILLER = """
import os, runpy, signal, sys
real, calls = os.{function}, 0
def {function}(*arguments):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
os.{function} = {function}
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("function", ["fsync", "replace", "link"])
def test_killed_while_saving_the_previous_checkpoint_loads_and_the_run_goes_on(call, experiment, function):
    """fsync: written, not yet in place; replace: about to be; link: saved, but best_model.tar not yet named."""
    whole, killed = experiment("whole", num_epochs=3), experiment("killed", num_epochs=3)
    assert call("train_scratch", whole).returncode == 0
    code = KILLER.format(function=function, call=2, root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *command("train_scratch", killed)[1:]], env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state(killed)["epoch"] >= 1
    assert call("train_scratch", killed).returncode == 0
    assert_same_run(whole, killed)
    assert not list(killed.glob(".*.tmp"))


def test_a_finished_run_says_so_and_is_left_alone(call, experiment):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    done = call("train_scratch", directory)
    assert done.returncode == 0
    assert "already finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_finished_run_is_finished_without_its_checkpoints(call, experiment):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    (directory / "last_model.tar").unlink()
    assert "already finished" in call("train_scratch", directory).stdout


@pytest.mark.parametrize("finished", [True, False])
def test_changed_parameters_under_a_run_are_an_error_that_names_them(call, experiment, finished):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    if not finished:
        (directory / "results.json").unlink()
    before = state(directory)["history"]
    done = call("train_scratch", directory, "--set", "learning_rate=0.5", "num_epochs=9")
    assert done.returncode == 2
    assert "learning_rate (0.001 -> 0.5)" in done.stderr
    assert "--restart" in done.stderr
    assert "batch_size" not in done.stderr
    assert "num_epochs (2 done -> 1)" in call("train_scratch", directory, "--set", "num_epochs=1").stderr
    assert state(directory)["history"] == before


def test_a_run_of_another_stage_is_not_continued(call, experiment):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    teacher = {"teacher_model": "net", "teacher_num_channels": 4, "temperature": 4, "alpha": 0.9}
    experiment(**teacher, teacher_resume=str(directory / "best_model.tar"))
    assert "written by train_scratch.py" in call("train_kd", directory).stderr


def test_restart_starts_over_and_gives_the_same_numbers(call, experiment):
    first, second = experiment("first"), experiment("second")
    assert call("train_scratch", first).returncode == 0
    assert call("train_scratch", second, "--set", "learning_rate=0.1").returncode == 0
    assert call("train_scratch", second, "--restart").returncode == 0
    assert_same_run(first, second)
    assert (second / "training.log").read_text().count("train_scratch.py") == 1
    assert len(list(second.glob("events.out.tfevents.*"))) == 1


def test_metrics_csv_is_whole_again_after_a_kill_between_its_rows(call, experiment):
    directory = unfinished(call, experiment())
    whole = (directory / "metrics.csv").read_bytes()
    for damage in (whole[:-20], whole + whole.splitlines(keepends=True)[-1], b""):
        (directory / "metrics.csv").write_bytes(damage)
        assert call("train_scratch", directory).returncode == 0
        assert (directory / "metrics.csv").read_bytes() == whole
        (directory / "results.json").unlink()


def test_resume_with_a_weights_only_checkpoint_starts_a_new_run_from_those_weights(call, experiment, tmp_path):
    source, directory = experiment("source", num_epochs=4), experiment("new", num_epochs=1)
    assert call("train_scratch", source).returncode == 0
    content = state(source)
    published = {key: content[key] for key in ("epoch", "state_dict", "optim_dict")}
    torch.save(published, tmp_path / "published.tar")
    done = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert done.returncode == 0
    assert f"test accuracy {content['history'][-1]['test_accuracy']:.2f} % before training" in done.stdout
    assert results(directory)["last"]["epoch"] == 1
    assert results(directory)["checkpoints_read"]["resume"]["path"] == str(tmp_path / "published.tar")
    again = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert "already finished" in again.stdout
    published["epoch"] = 99
    torch.save(published, tmp_path / "published.tar")
    other = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert other.returncode == 2
    assert "did not begin from it" in other.stderr


def test_resume_with_a_state_of_another_directory_continues_that_run_here(call, experiment):
    whole, first, second = (experiment(name, num_epochs=4) for name in ("whole", "first", "second"))
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", first, "--set", "num_epochs=2").returncode == 0
    assert call("train_scratch", second, "--resume", first / "last_model.tar").returncode == 0
    assert_same_run(whole, second)
    assert state(first)["epoch"] == 2


def test_resume_with_the_best_model_of_the_run_goes_back_to_its_epoch(call, experiment):
    directory = experiment(num_epochs=3)
    assert call("train_scratch", directory).returncode == 0
    whole = (directory / "metrics.csv").read_bytes()
    assert call("train_scratch", directory, "--resume", directory / "best_model.tar").returncode == 0
    assert (directory / "metrics.csv").read_bytes() == whole


def test_another_teacher_under_an_unfinished_run_is_an_error(call, experiment, tmp_path):
    teachers = [experiment(f"teacher{seed}", seed=seed, num_epochs=1) for seed in (0, 1)]
    for directory in teachers:
        assert call("train_scratch", directory).returncode == 0
    path = tmp_path / "teacher.tar"
    path.write_bytes((teachers[0] / "best_model.tar").read_bytes())
    student = experiment("student", teacher_model="net", teacher_num_channels=4, teacher_resume=str(path),
                         temperature=4, alpha=0.9)
    assert call("train_kd", student).returncode == 0
    (student / "results.json").unlink()
    path.write_bytes((teachers[1] / "best_model.tar").read_bytes())
    done = call("train_kd", student)
    assert done.returncode == 2
    assert "is not the checkpoint that this run began with" in done.stderr


def test_two_processes_do_not_train_in_one_directory(call, experiment):
    directory = experiment()
    import fcntl
    with open(directory / "training.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = call("train_scratch", directory)
    assert done.returncode == 2
    assert "another process" in done.stderr
    assert os.listdir(directory).count("last_model.tar") == 0


def test_an_interrupt_says_how_to_go_on(experiment):
    directory = experiment(num_epochs=5000)
    process = subprocess.Popen(command("train_scratch", directory), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    wait_for(directory / "last_model.tar", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
