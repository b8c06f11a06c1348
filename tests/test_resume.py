"""Stopped, killed and repeated runs: equal numbers, and no lost or overwritten files."""
import contextlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, environment, refused, results
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from utils import checkpoint, console, convolution, interrupts, step
from utils.logger import Logger

ALIKE = {"dropout_rate": 0.3}  # the dropout seed derives from the epoch


def state(directory, name="last_model.tar"):
    return checkpoint.load(directory / name).content


def assert_same_run(directory, other):
    """Assert that weights, optimizer, history and metrics.csv of two runs are equal bit for bit."""
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
    """Run that was stopped just before it wrote results.json."""
    assert call("train_scratch", directory, *arguments).returncode == 0
    (directory / "results.json").unlink()
    return directory


@pytest.mark.parametrize("model", [{"model_name": "net"}, {"model_name": "preresnet20", "learning_rate": 0.1}])
def test_a_run_of_two_plus_two_epochs_equals_one_of_four(call, experiment, model):
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


@pytest.mark.slow
def test_a_killed_run_continues_to_equal_results(stage, experiment):
    whole, directory = (experiment(name, **ALIKE, num_epochs=60) for name in ("whole", "killed"))
    stage("train_scratch", whole)
    for delay in (0.05, 0.13):
        (directory / "last_model.tar").unlink(missing_ok=True)
        process = subprocess.Popen(command("train_scratch", directory, "--restart"), env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(directory / "last_model.tar", process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 1 <= state(directory)["epoch"] < 60
        assert not (directory / "results.json").exists()
        done = stage("train_scratch", directory)
        assert "resuming after epoch" in done.stdout
        assert_same_run(whole, directory)


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


def killed(directory, function, call, *arguments):
    """Run a stage that kills itself when it calls `os.FUNCTION` for the CALL-th time."""
    code = KILLER.format(function=function, call=call, root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *command("train_scratch", directory, *arguments)[1:]],
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_run_killed_while_saving_continues_from_the_previous_checkpoint(call, experiment, function, number):
    """fsync: the file is written, but not in place; replace: about to be. 2: last model saved, best model not."""
    whole, directory = experiment("whole", num_epochs=3), experiment("killed", num_epochs=3)
    assert call("train_scratch", whole).returncode == 0
    killed(directory, function, number)
    assert state(directory)["epoch"] >= 1
    assert call("train_scratch", directory).returncode == 0
    assert_same_run(whole, directory)
    assert not list(directory.glob(".*.tmp"))


def test_finished_runs_are_skipped(call, experiment):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    done = call("train_scratch", directory)
    assert done.returncode == 0
    assert "already finished" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_finished_run_without_checkpoints_is_skipped(call, experiment):
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
    assert "num_epochs (2 -> 1)" in call("train_scratch", directory, "--set", "num_epochs=1").stderr
    assert state(directory)["history"] == before


def test_a_run_of_another_stage_is_not_continued(call, experiment):
    directory = experiment()
    assert call("train_scratch", directory).returncode == 0
    teacher = {"teacher_model": "net", "teacher_num_channels": 4, "temperature": 4, "alpha": 0.9}
    experiment(**teacher, teacher_resume=str(directory / "best_model.tar"))
    assert "holds a run of train_scratch.py, not of train_kd.py" in call("train_kd", directory).stderr


def test_restart_reproduces_the_results(call, experiment):
    first, second = experiment("first"), experiment("second")
    assert call("train_scratch", first).returncode == 0
    assert call("train_scratch", second, "--set", "learning_rate=0.1").returncode == 0
    assert call("train_scratch", second, "--restart").returncode == 0
    assert_same_run(first, second)
    assert (second / "training.log").read_text().count("train_scratch.py") == 1
    assert len(list(second.glob("events.out.tfevents.*"))) == 1


def test_metrics_csv_is_repaired_after_a_kill(call, experiment):
    directory = unfinished(call, experiment())
    whole = (directory / "metrics.csv").read_bytes()
    for damage in (whole[:-20], whole + whole.splitlines(keepends=True)[-1], b""):
        (directory / "metrics.csv").write_bytes(damage)
        assert call("train_scratch", directory).returncode == 0
        assert (directory / "metrics.csv").read_bytes() == whole
        (directory / "results.json").unlink()


def test_damaged_results_are_written_again_from_the_last_checkpoint(call, experiment):
    directory = unfinished(call, experiment())
    for damage in ("", "[]", "[" * 100_000, '{"stage": 1, "stage": 2}'):
        (directory / "results.json").write_text(damage)
        assert call("train_scratch", directory).returncode == 0
        assert results(directory)["stage"] == "train_scratch.py"


def test_resume_with_a_weights_only_checkpoint_starts_a_new_run_from_those_weights(call, experiment, tmp_path):
    source, directory = experiment("source", num_epochs=4), experiment("new", num_epochs=1)
    assert call("train_scratch", source).returncode == 0
    content = state(source)
    published(tmp_path / "published.tar", source)
    done = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert done.returncode == 0
    assert f"before training: test accuracy {content['history'][-1]['test_accuracy']:.2f} %" in done.stdout
    assert results(directory)["last"]["epoch"] == 1
    assert results(directory)["checkpoints_read"]["resume"]["path"] == str(tmp_path / "published.tar")
    again = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert "already finished" in again.stdout
    torch.save(content["state_dict"], tmp_path / "published.tar")
    other = call("train_scratch", directory, "--resume", tmp_path / "published.tar")
    assert other.returncode == 2
    assert "did not start from it" in other.stderr


def test_resume_with_a_state_of_another_directory_continues_that_run_here(call, experiment):
    whole, first, second = (experiment(name, num_epochs=4) for name in ("whole", "first", "second"))
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", first, "--set", "num_epochs=2").returncode == 0
    assert call("train_scratch", second, "--resume", first / "last_model.tar").returncode == 0
    assert_same_run(whole, second)
    assert state(first)["epoch"] == 2


def test_a_chain_of_directories_may_continue_one_run(call, experiment):
    whole, *parts = (experiment(name, num_epochs=4) for name in ("whole", "a", "b", "c"))
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", parts[0], "--set", "num_epochs=1").returncode == 0
    for epochs, one, two in ((2, parts[0], parts[1]), (4, parts[1], parts[2])):
        arguments = ("--resume", one / "last_model.tar", "--set", f"num_epochs={epochs}")
        assert call("train_scratch", two, *arguments).returncode == 0
    assert_same_run(whole, parts[2])


@pytest.mark.slow
def test_a_continued_run_killed_in_its_first_epoch_here_continues_with_the_same_command(call, experiment):
    whole, first, second = (experiment(name, num_epochs=4) for name in ("whole", "first", "second"))
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", first, "--set", "num_epochs=2").returncode == 0
    resume = ("--resume", first / "last_model.tar")
    killed(second, "fsync", 2, *resume)
    assert state(second)["epoch"] == 2
    assert call("train_scratch", second, *resume).returncode == 0
    assert_same_run(whole, second)


def test_the_best_model_only_resumes_a_run_without_its_last_model(call, experiment):
    whole, directory = experiment("whole", num_epochs=4), experiment(num_epochs=4)
    assert call("train_scratch", whole).returncode == 0
    assert call("train_scratch", directory, "--set", "num_epochs=2").returncode == 0
    best = directory / "best_model.tar"
    if state(directory)["epoch"] != state(directory, "best_model.tar")["epoch"]:
        assert "resumes from its last_model.tar" in refused(call, "train_scratch", directory, "--resume", best)
    (directory / "last_model.tar").unlink()
    assert call("train_scratch", directory, "--resume", best).returncode == 0
    assert_same_run(whole, directory)


def test_a_run_that_was_interrupted_is_not_shortened(call, experiment):
    """The second command has most likely forgotten the --set of the first one."""
    directory = experiment(num_epochs=2)
    assert call("train_scratch", directory, "--set", "num_epochs=1").returncode == 0
    content = state(directory)
    content["params"]["num_epochs"] = 4  # as if interrupted
    checkpoint.save(content, directory / "last_model.tar")
    (directory / "results.json").unlink()
    assert "num_epochs (4 -> 2)" in refused(call, "train_scratch", directory)


def test_a_restart_from_a_state_without_its_best_model_removes_nothing(call, experiment):
    other, directory = experiment("other", num_epochs=4), experiment(num_epochs=4)
    assert call("train_scratch", other).returncode == 0
    assert call("train_scratch", directory, "--set", "num_epochs=1").returncode == 0
    content = state(other)
    content["history"][0]["test_accuracy"] = 101.0  # the best epoch was not the last one
    checkpoint.save(content, other / "last_model.tar")
    (other / "best_model.tar").unlink()
    line = refused(call, "train_scratch", directory, "--restart", "--resume", other / "last_model.tar")
    assert "best_model.tar does not exist" in line


def published(path, directory):
    """Checkpoint in the format of the published code."""
    torch.save({key: state(directory)[key] for key in ("epoch", "state_dict", "optim_dict")}, path)
    return path


@pytest.mark.parametrize("name", ["best_model.tar", "last_model.tar"])
def test_published_weights_in_a_run_directory_are_never_overwritten(call, experiment, name):
    source, directory = experiment("source", num_epochs=1), experiment()
    assert call("train_scratch", source).returncode == 0
    path = published(directory / name, source)
    assert str(path) in refused(call, "train_scratch", directory)
    assert "move it to another directory" in refused(call, "train_scratch", directory, "--resume", path)
    assert "contradict" in refused(call, "train_scratch", directory, "--restart", "--resume", path)


def test_a_foreign_checkpoint_with_our_keys_is_no_resumable_state(call, experiment, tmp_path):
    source, directory = experiment("source", num_epochs=1), experiment(num_epochs=1)
    assert call("train_scratch", source).returncode == 0
    torch.save({"state_dict": state(source)["state_dict"], "history": [1], "params": None}, tmp_path / "foreign.tar")
    assert call("train_scratch", directory, "--resume", tmp_path / "foreign.tar").returncode == 0
    assert results(directory)["last"]["epoch"] == 1


def test_a_finished_run_without_its_checkpoints_does_not_silently_start_over(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    for path in directory.glob("*.tar"):
        path.unlink()
    assert "no last_model.tar to resume from" in refused(call, "train_scratch", directory, "--set", "num_epochs=2")


@pytest.mark.slow
def test_an_extended_run_is_not_finished(experiment, call):
    directory = experiment(num_epochs=4)
    assert call("train_scratch", directory, "--set", "num_epochs=2").returncode == 0
    killed(directory, "fsync", 2)
    assert not (directory / "results.json").exists()
    assert call("train_scratch", directory).returncode == 0
    assert results(directory)["last"]["epoch"] == 4


def test_a_resume_that_changes_nothing_leaves_no_temporary_file(call, experiment):
    directory = unfinished(call, experiment(num_epochs=1))
    assert call("train_scratch", directory).returncode == 0
    assert not list(directory.glob(".*"))


def test_a_finished_student_warns_that_its_teacher_has_changed(call, experiment):
    teacher = experiment("teacher", num_epochs=1)
    assert call("train_scratch", teacher).returncode == 0
    student = experiment("student", teacher_model="net", teacher_num_channels=4, temperature=4, alpha=0.9,
                         teacher_resume=str(teacher / "best_model.tar"))
    assert call("train_kd", student).returncode == 0
    assert "has changed since" not in call("train_kd", student).stdout
    assert call("train_scratch", teacher, "--restart", "--set", "seed=1").returncode == 0
    done = call("train_kd", student)
    assert done.returncode == 0
    assert f"teacher: {teacher / 'best_model.tar'} has changed since" in done.stdout


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
    assert "is not the checkpoint that this run started with" in done.stderr


def test_images_that_changed_under_a_run_are_an_error(call, experiment, data, tmp_path):
    shutil.copytree(data, tmp_path / "mine")
    directory = experiment(dataset=f"folder:{tmp_path / 'mine'}", num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    (tmp_path / "mine" / "train" / "red" / "00.png").unlink()
    line = refused(call, "train_scratch", directory, "--set", "num_epochs=2")
    assert "changed since this run started (images, mean, std)" in line


@pytest.mark.parametrize("key", ["teacher_resume", "adversarial_resume", "init_from"])
def test_a_restart_never_removes_a_checkpoint_that_it_reads(call, experiment, key):
    normal = experiment(num_epochs=1)
    assert call("train_scratch", normal).returncode == 0
    roles = {"teacher_resume": ("train_kd", {"teacher_model": "net", "teacher_num_channels": 4, "alpha": 0.9}),
             "adversarial_resume": ("train_nasty", {"adversarial_model": "net", "adversarial_num_channels": 4,
                                                    "weight": 0.1})}
    script, role = roles.get(key, ("train_scratch", {}))
    temperature = {"temperature": 4} if role else {}
    directory = experiment(num_epochs=1, **role, **temperature, **{key: str(normal / "best_model.tar")})
    line = refused(call, script, directory, "--restart")
    assert key in line
    assert "move it" in line


def test_two_sets_of_weights_to_start_from_contradict_each_other(call, experiment, tmp_path):
    source = experiment("source", num_epochs=1)
    assert call("train_scratch", source).returncode == 0
    torch.save(state(source)["state_dict"], tmp_path / "weights.tar")
    directory = experiment(init_from=str(tmp_path / "weights.tar"))
    assert "contradict" in refused(call, "train_scratch", directory, "--resume", tmp_path / "weights.tar")


def test_a_state_of_other_parameters_gives_its_weights_as_init_from(call, experiment):
    source, directory = experiment("source", num_epochs=1), experiment("other", learning_rate=0.5)
    assert call("train_scratch", source).returncode == 0
    line = refused(call, "train_scratch", directory, "--resume", source / "last_model.tar")
    assert "learning_rate" in line
    assert "init_from" in line
    assert "--restart" not in line
    done = call("train_scratch", directory, "--set", f"init_from={source / 'last_model.tar'}")
    assert done.returncode == 0
    assert f"before training: test accuracy {results(source)['last']['test_accuracy']:.2f} %" in done.stdout
    done = call("train_scratch", directory, "--set", f"init_from={source / 'last_model.tar'}", "num_epochs=3")
    assert done.returncode == 0
    assert "the network itself" not in done.stdout  # the network has changed since loading


def test_results_name_every_call_that_a_run_took(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert call("train_scratch", directory, "--set", "num_epochs=2").returncode == 0
    sessions = results(directory)["sessions"]
    assert [(session["after_epoch"], session["set"]) for session in sessions] == [(0, {}), (1, {"num_epochs": 2})]
    assert all(session["versions"]["torch"] == torch.__version__ for session in sessions)


@pytest.mark.parametrize("key, value", [("history", [1]), ("history", [{"epoch": 1}]), ("timings", []),
                                        ("sources", {"teacher": 1}), ("epoch", 7)])
def test_a_damaged_state_only_loads_as_weights(call, experiment, key, value):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    torch.save({**state(directory), key: value}, directory / "last_model.tar")
    assert "no state to resume from" in refused(call, "train_scratch", directory, "--set", "num_epochs=2")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--restart",)])
def test_two_processes_do_not_train_in_one_directory(call, experiment, arguments):
    directory = experiment(num_epochs=5000)
    process = subprocess.Popen(command("train_scratch", directory), env=environment(), stdout=subprocess.DEVNULL)
    try:
        wait_for(directory / "last_model.tar", process)
        done = call("train_scratch", directory, *arguments)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 2
    assert "another process" in done.stderr
    assert state(directory)["epoch"] >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_a_critical_section(number):
    done = []
    before = signal.signal(signal.SIGTERM, lambda *_: done.append("told"))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            with interrupts.deferred():
                signal.raise_signal(number)
                done.append("whole")
            done.append("not interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == {signal.SIGINT: ["whole"], signal.SIGTERM: ["whole", "told", "not interrupted"]}[number]


def test_an_interrupt_during_the_logs_of_an_epoch_keeps_them_complete(call, experiment, monkeypatch):
    log = Logger.epoch

    def interrupted(self, progress, num_epochs):
        signal.raise_signal(signal.SIGINT)
        log(self, progress, num_epochs)
    monkeypatch.setattr(Logger, "epoch", interrupted)
    directory = experiment(num_epochs=3)
    assert call("train_scratch", directory).returncode == 130
    assert state(directory)["epoch"] == 1
    assert len((directory / "metrics.csv").read_text().splitlines()) == 2


def test_an_interrupt_that_torch_wraps_in_another_error_is_an_interrupt(call, experiment, monkeypatch):
    """A torch mode cannot end between being taken off its stack and being put back."""
    pop = torch.overrides._pop_mode
    once = iter([signal.SIGINT])

    def interrupted():
        mode = pop()
        for number in once:
            signal.raise_signal(number)
        return mode
    monkeypatch.setattr(step, "fast_convolutions", lambda *_: convolution._Wide())  # as on a processor with AVX2
    monkeypatch.setattr(torch.overrides, "_pop_mode", interrupted)
    directory = experiment()
    done = call("train_scratch", directory)
    assert done.returncode == 130
    assert "the same command (without --restart) continues" in done.stderr
    assert (directory / "training.log").read_text().endswith("stopped: KeyboardInterrupt\n")


def test_an_interrupt_while_tqdm_takes_its_lock_waits_for_the_line(monkeypatch, capsys):
    lock = tqdm.get_lock()

    def late(self):
        signal.raise_signal(signal.SIGINT)
        lock.th_lock.acquire()
    monkeypatch.setattr(TqdmDefaultWriteLock, "acquire", late)
    monkeypatch.setattr(TqdmDefaultWriteLock, "release", lambda self: lock.th_lock.release())
    with pytest.raises(KeyboardInterrupt):
        console.print_line("whole")
    assert capsys.readouterr().out == "whole\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_prints_how_to_continue(experiment, number):
    directory = experiment(num_epochs=5000)
    process = subprocess.Popen(command("train_scratch", directory), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    wait_for(directory / "last_model.tar", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "the same command (without --restart) continues" in stderr
    assert "stopped" in (directory / "training.log").read_text().splitlines()[-1]
    assert "Traceback" not in stderr
