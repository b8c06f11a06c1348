"""run_all.py, seeds.py and Snakemake: dependency order, skipped finished runs, failures."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, all_end, environment

from runs.directories import find, is_seed, unreadable
from runs.graph import check_sources, needs, without
from utils.errors import UserError


@pytest.fixture
def tree(experiment, tmp_path):
    """A teacher, its student and a student of the student; the alphabetical order of directories is different."""
    teacher = {"teacher_model": "net", "teacher_num_channels": 4, "temperature": 4, "alpha": 0.9, "num_epochs": 1}
    experiment("tree/z", num_epochs=1)
    experiment("tree/y", **teacher, teacher_resume=str(tmp_path / "tree/z/last_model.tar"))
    experiment("tree/x", **teacher, teacher_resume=str(tmp_path / "tree/y/last_model.tar"))
    return tmp_path / "tree"


def script(name, *arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)],
                          capture_output=True, text=True, env=environment(), **options)


def test_running_and_reporting_experiments_does_not_import_torch():
    code = "import sys; sys.path += ['.', 'scripts']; import report, run_all, seeds; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_each_run_follows_its_dependencies(tree):
    assert [directory.name for directory in needs(find([tree])[0])] == ["z", "y", "x"]


def test_dependency_cycles_and_missing_checkpoints_are_named(tree):
    params = json.loads((tree / "z/params.json").read_text())
    (tree / "z/params.json").write_text(json.dumps(params | {"init_from": str(tree / "x/last_model.tar")}))
    with pytest.raises(UserError, match="cycle"):
        needs(find([tree])[0])
    with pytest.raises(UserError, match=r'y: "teacher_resume": .*z/last_model.tar is missing, and none of these'):
        needs(find([tree / "y"])[0])


def test_a_finished_teacher_without_its_checkpoint_is_named_before_anything_is_run(tree, call):
    assert call("train_scratch", tree / "z").returncode == 0
    check_sources(find([tree])[0])
    (tree / "z/last_model.tar").unlink()
    with pytest.raises(UserError, match=r".*z/last_model.tar is missing, and .*z is finished without it"):
        check_sources(find([tree])[0])


@pytest.mark.slow
def test_a_seed_learns_from_the_teacher_of_its_seed(tree):
    assert "3 written" in script("seeds", 1, tree).stdout
    params = json.loads((tree / "y/seed1/params.json").read_text())
    assert params["seed"] == 1
    assert params["teacher_resume"] == str(tree / "z/seed1/last_model.tar")
    assert "0 written, 3 exist already" in script("seeds", 1, tree).stdout
    (tree / "y/seed1/params.json").write_text(json.dumps(params | {"teacher_resume": str(tree / "z/last_model.tar")}))
    assert f"y/seed1 reads {tree / 'z/last_model.tar'}, although " in script("seeds", 1, tree).stdout
    (tree / "y/seed1/params.json").write_text("[]")
    done = script("seeds", 1, tree)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "y/seed1/params.json" in done.stderr
    assert script("seeds", 0, tree).returncode == script("seeds", 2**31, tree).returncode == 2


@pytest.mark.slow
def test_a_seed_without_a_teacher_of_its_seed_says_so(tree):
    done = script("seeds", 1, tree / "y")
    assert f"y/seed1 reads {tree / 'z/last_model.tar'}, which has no seed 1" in done.stdout
    script("seeds", 1, f"{tree}/../tree/x", tree / "y")  # independent of the notation of a path
    assert json.loads((tree / "x/seed1/params.json").read_text())["teacher_resume"] == str(
        tree / "y/seed1/last_model.tar")


@pytest.mark.slow
def test_all_are_run_once_and_in_order(tree, tmp_path):
    done = script("run_all", tree, "--jobs", 2, "--seeds", 0, 1, "--data_dir", tmp_path / "data")
    assert done.returncode == 0, done.stdout + done.stderr
    finished = [line.rpartition("tree/")[2] for line in done.stdout.splitlines() if line.startswith("finished")]
    assert sorted(finished) == ["x", "x/seed1", "y", "y/seed1", "z", "z/seed1"]
    for suffix in ("", "/seed1"):
        order = [f"{name}{suffix}" for name in "zyx"]
        assert [name for name in finished if name in order] == order
    again = script("run_all", tree)
    assert (again.returncode, again.stdout) == (0, "6 runs, 6 of them finished\n")


def test_a_dry_run_runs_and_writes_nothing(tree):
    before = sorted(tree.rglob("*"))
    done = script("run_all", tree, "--dry_run", "--seeds", 0, 1)
    assert done.returncode == 0 and sorted(tree.rglob("*")) == before
    assert f"would make and run {tree / 'x/seed1'}" in done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith("python")]
    assert [command.rpartition("/")[2] for command in commands] == ["z", "y", "x"]


def test_an_unreadable_directory_is_an_error_beside_a_good_one(tree):
    (tree / "y/params.json").write_text("[]")
    done = script("run_all", tree / "z", tree / "y", "--dry_run")
    assert done.returncode == 2 and f"{tree / 'y'} holds no experiment" in done.stderr


def test_checkpoints_of_an_unreadable_finished_run_can_be_used(tree):
    params = json.loads((tree / "y/params.json").read_text())
    (tree / "y/params.json").write_text(json.dumps(params | {"teacher_resume": str(tree / "z/last_model.tar#ema")}))
    (tree / "z/params.json").write_text('{"dataset": ')
    for name in ("last_model.tar", "results.json"):
        (tree / "z" / name).write_text("")
    runs, _ = find([tree])
    assert without(runs, [tree / "z"]) == (runs, [])


def finish(directory):
    """Write a results.json like that of a finished run."""
    params = json.loads((directory / "params.json").read_text())
    row = {"epoch": 1, "test_accuracy": 50.0}
    (directory / "results.json").write_text(json.dumps({
        "stage": "train_scratch.py", "params": params, "set": {}, "best": row, "last": row}))


@pytest.mark.slow
def test_an_unreadable_run_only_stops_its_dependents(tree, experiment):
    experiment("tree/a")
    (tree / "z/params.json").write_text('{"dataset": ')
    runs, remarks = find([tree])
    assert unreadable([tree, tree / "z"], runs) == [tree / "z"] and len(remarks) == 1
    kept, texts = without(runs, [tree / "z"])
    assert [run.directory for run in kept] == [tree / "a"]
    assert texts == [f"{tree / 'y'} needs {tree / 'z/last_model.tar'}",
                     f"{tree / 'x'} needs {tree / 'y/last_model.tar'}"]
    for name in ("last_model.tar", "results.json"):  # it is finished, even if its params.json has changed
        assert without(runs, [tree / "z"])[0] == kept
        (tree / "z" / name).write_text("")
    assert without(runs, [tree / "z"]) == (runs, [])


@pytest.mark.slow
def test_unreadable_runs_give_exit_status_1(tree, experiment):
    for directory in (tree / "z", experiment("tree/a", num_epochs=1)):
        finish(directory)
    (tree / "y/params.json").write_text("{")
    done = script("run_all", tree)
    assert done.returncode == 1 and "2 runs, 2 of them finished" in done.stdout
    assert done.stderr.splitlines()[-1] == (f"error: cannot be read: {tree / 'y/params.json'}; "
                                            f"{tree / 'x'} needs {tree / 'y/last_model.tar'}")
    done = script("seeds", 1, tree)
    assert (done.returncode, done.stderr) == (1, f"error: cannot be read: {tree / 'y/params.json'}\n")
    (tree / "a/seed1/params.json").write_text("{")
    done = script("run_all", tree, "--seeds", 1, "--dry_run")
    assert done.returncode == 1 and f"{tree / 'a/seed1/params.json'}" in done.stderr
    assert f"--save_path {tree / 'z/seed1'}" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (("--jobs", "0"), "--jobs is 0"), (("--seeds", "-1"), "-1 is not a seed"), (("--gpus", "0"), "are not finished")])
def test_invalid_options_are_one_line(tree, arguments, words):
    done = script("run_all", tree, *arguments)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tree.rglob("results.json"))


@pytest.mark.slow
def test_files_of_a_killed_run_do_not_stop_the_next_one(tree):
    assert script("run_all", tree / "z").returncode == 0
    (tree / "z/results.json").unlink()
    with open(tree / "z/metrics.csv", "a") as file:
        file.write("2,0.1")
    (tree / "y/results.json").write_text("{")
    done = script("run_all", tree)
    assert done.returncode == 0, done.stderr
    assert "metrics.csv is damaged" in done.stdout and (tree / "x/results.json").exists()


@pytest.mark.slow
def test_a_finished_run_does_not_need_its_teacher(tree):
    assert script("run_all", tree).returncode == 0
    shutil.rmtree(tree / "z")
    assert script("run_all", tree).stdout == "2 runs, 2 of them finished\n"


@pytest.mark.slow
def test_an_interrupt_ends_all_runs_without_failures(tree):
    shutil.copytree(tree / "z", tree / "w")
    for name in ("z", "w"):
        params = json.loads((tree / name / "params.json").read_text())
        (tree / name / "params.json").write_text(json.dumps(params | {"num_epochs": 10_000}))
    process = subprocess.Popen([sys.executable, str(ROOT / "scripts/run_all.py"), str(tree), "--jobs", "2"],
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not all((tree / name / "metrics.csv").exists() for name in ("z", "w")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "failed" not in out + errors
    assert all_end(process.pid)


@pytest.mark.slow
def test_independent_runs_continue_after_a_failure(tree, experiment):
    experiment("tree/a", num_epochs=1)
    params = json.loads((tree / "y/params.json").read_text())
    (tree / "y/params.json").write_text(json.dumps(params | {"teacher_num_channels": 5}))
    (tree / "b").mkdir()
    (tree / "b/params.json").write_text("[]")
    done = script("run_all", tree, "--jobs", 2)
    assert done.returncode == 2
    assert (tree / "a/results.json").exists() and (tree / "z/results.json").exists()
    assert "last_model.tar" in done.stdout and f"skipped, as a run that it needs failed: {tree / 'x'}" in done.stdout
    assert done.stderr.startswith("error: 2 of 4 runs are not finished")
    assert done.stderr.endswith(f"; cannot be read: {tree / 'b/params.json'}\n")


@pytest.mark.slow
@pytest.mark.parametrize(("demo", "count"), [("demo_theft", 12), ("demo_abd", 5)])
def test_demo_scripts_run_and_report_existing_experiments(demo, count):
    # the script without its installation and training commands
    spied = 'source() { :; }; python() { echo "$@"; }; . "$0"'
    done = subprocess.run(["bash", "-c", spied, f"scripts/{demo}.sh", "1", "2"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    commands = {line.partition(" ")[0]: line.split()[1:] for line in done.stdout.splitlines()}
    directories = commands["report.py"]
    assert commands["scripts/run_all.py"] == [*directories, "--seeds", "1", "2"]
    runs, remarks = find(ROOT / directory for directory in directories)
    assert not remarks
    runs = [run for run in runs if not is_seed(run.directory)]
    assert len(runs) == count and len(needs(runs)) == count


@pytest.mark.slow
def test_the_demo_audits_the_teachers_that_it_trains_and_compares_them():
    spied = 'source() { :; }; python() { echo "$@"; }; . "$0"'
    done = subprocess.run(["bash", "-c", spied, "scripts/demo.sh", "1", "2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    trained, *audits, compared, told = [line.split() for line in done.stdout.splitlines()]
    assert all(f"{words[2]}/audit.md" in " ".join(told) for words in audits)
    assert compared == ["audit.py", "--compare", *(words[2] for words in audits)]
    assert [run.directory.name for run in find(ROOT / name for name in trained[1:3])[0]] == ["net16", "nasty_net16"]
    for words in audits:
        assert words[0] == "audit.py" and words[-1] == "seeds=[1,2]"
        assert json.loads((ROOT / words[2] / "params.json").read_text())["checkpoint"] in trained


def snakemake(tree, *arguments):
    return [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--rerun-triggers", "mtime",
            "--cores", "1", "--directory", str(tree.parent), *arguments, "--config", f"experiments={tree}",
            f"data_dir={tree.parent / 'data'}"]


@pytest.mark.slow
def test_snakemake_fails_at_the_end_if_a_run_is_unreadable(tree):
    pytest.importorskip("snakemake")
    finish(tree / "z")
    (tree / "y/params.json").write_text("{")
    done = subprocess.run(snakemake(tree), capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and f"error: cannot be read: {tree / 'y/params.json'}" in done.stderr
    assert "Execute 1 jobs" in done.stderr and "localrule all" in done.stderr


@pytest.mark.slow
def test_snakemake_skips_finished_runs(tree):
    pytest.importorskip("snakemake")
    dry = subprocess.run(snakemake(tree, "--dry-run"), capture_output=True, text=True, env=environment())
    assert dry.returncode == 0, dry.stderr
    assert not (tree / "z/results.json").exists()
    process = subprocess.Popen(snakemake(tree), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while not (tree / "y/training.log").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tree / "y/results.json").exists()
    before = (tree / "z/results.json").stat().st_mtime_ns
    subprocess.run(snakemake(tree, "--unlock"), capture_output=True, env=environment(), check=True)
    done = subprocess.run(snakemake(tree, "--rerun-incomplete"), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert (tree / "z/results.json").stat().st_mtime_ns == before
    assert (tree / "x/results.json").exists()
    os.utime(tree / "z/params.json")
    again = subprocess.run([*snakemake(tree, "--dry-run"), "data_dir=elsewhere"], capture_output=True, text=True,
                           env=environment())
    assert "Nothing to be done" in again.stdout + again.stderr
