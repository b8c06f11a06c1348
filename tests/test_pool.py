"""Pool of run processes: number of jobs, GPUs, and messages about failures."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
from conftest import ROOT, all_end, environment

from runs.directories import find
from runs.pool import Pool, Watcher

LONG = 10_000  # epochs


class Told(Watcher):
    """Records its calls, and the number of simultaneous runs."""

    def __init__(self):
        self.running, self.most = 0, 0
        self.ended, self.errors, self.without = [], {}, []

    def started(self, run, number, of):
        self.running += 1
        self.most = max(self.most, self.running)

    def finished(self, run, seconds):
        self.running -= 1
        self.ended.append(run.directory.name)

    def failed(self, run, error):
        self.running -= 1
        self.errors[run.directory.name] = error

    def skipped(self, run):
        self.without.append(run.directory.name)


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """`pool(jobs, needs)` runs the experiments below `tmp_path`; returns the failed ones and the recorded calls."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(jobs=1, needs=None):
        runs = {each.directory: each for each in find([tmp_path])[0]}
        graph = {at: [tmp_path / name for name in (needs or {}).get(at.name, ())] for at in runs}
        told = Told()
        failed = Pool(jobs, data_dir=tmp_path / "data", watcher=told).run(graph, runs)
        return [at.name for at in failed], told
    return run


def test_an_empty_pool_does_nothing(pool, tmp_path):
    assert pool(2) == ([], ANY)
    assert not list(tmp_path.iterdir())


def test_runs_are_distributed_over_the_gpus(experiment, monkeypatch, tmp_path):
    for name in "abc":
        experiment(name)
    commands = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            commands.append(args[0])
            self.sentinel, end = os.pipe()
            os.close(end)  # ready at once

        def start(self):
            pass

        def join(self):
            pass

    monkeypatch.setattr("runs.pool._context", lambda: SimpleNamespace(Process=Process))
    runs = {run.directory: run for run in find([tmp_path])[0]}
    assert Pool(2, gpus=[3, 5], watcher=Told()).run({at: [] for at in runs}, runs) == []
    assert len(commands) == 3 and {words[words.index("--gpu_id") + 1] for words in commands} == {"3", "5"}
    assert Pool(1, watcher=Told()).run({at: [] for at in runs}, runs) == []
    assert all("--gpu_id" not in words for words in commands[3:])


@pytest.mark.slow
def test_each_run_runs_once_with_at_most_jobs_at_a_time(pool, experiment):
    for name in "abcd":
        experiment(name, num_epochs=1)
    failed, told = pool(2)
    assert not failed and sorted(told.ended) == list("abcd") and told.most == 2


@pytest.mark.slow
def test_a_failure_is_reported_and_dependent_runs_are_left_out(pool, experiment, tmp_path):
    experiment("a", init_from=str(tmp_path / "nowhere.tar"))
    experiment("b", num_epochs=1)
    experiment("c", num_epochs=1)
    failed, told = pool(1, {"b": ["a"]})
    assert failed == ["a", "b"] and told.without == ["b"] and told.ended == ["c"]
    assert told.errors["a"].startswith("error: ") and "nowhere.tar" in told.errors["a"]
    assert "\n" not in told.errors["a"]


@pytest.mark.slow
def test_a_killed_run_has_failed_and_the_next_one_runs(pool, experiment, tmp_path):
    directory = experiment("a", num_epochs=LONG)
    experiment("b", num_epochs=1)

    def kill():
        while not (directory / "metrics.csv").exists():
            time.sleep(0.02)
        for child in multiprocessing.active_children():
            child.kill()
    killer = threading.Thread(target=kill)
    killer.start()
    failed, told = pool(1)
    killer.join()
    assert failed == ["a"] and told.errors == {"a": "exit status -9"} and told.ended == ["b"]


@pytest.mark.slow
def test_runs_end_with_their_parent_and_release_their_directories(experiment, tmp_path):
    directory = experiment("a", num_epochs=LONG)
    experiment("b", num_epochs=LONG)
    words = [sys.executable, str(ROOT / "scripts/run_all.py"), str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while len(list(tmp_path.rglob("metrics.csv"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert all_end(process.pid)
    rows = (directory / "metrics.csv").read_text().splitlines()
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"num_epochs": len(rows) + 1}))
    done = subprocess.run([*words[:2], str(directory)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "1 run in" in done.stdout, done.stderr
