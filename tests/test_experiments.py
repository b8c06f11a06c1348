"""The params.json of the repository and the recipes that write them."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import COMMITTED, EXPERIMENTS, ROOT

from experiments.make import differing, make, unknown
from experiments.recipes import PUBLISHED, all_runs
from runs.directories import find, is_seed
from runs.seeds import write
from runs.stages import AUDIT
from utils.params import load_params

SHIPPED = sorted({name.partition("/")[0] for name in EXPERIMENTS})


def test_the_recipes_write_the_files_of_the_repository():
    assert list(differing(ROOT / "experiments")) == []


def test_every_params_json_has_a_recipe_or_was_published():
    assert EXPERIMENTS.keys() <= all_runs().keys() | PUBLISHED
    for folder in COMMITTED:
        files = (ROOT / "experiments" / folder).rglob("params.json")
        assert {str(file.parent.relative_to(ROOT / "experiments")) for file in files} == {
            run for run in all_runs() if run.startswith(f"{folder}/")}


def test_published_runs_are_those_of_the_paper_and_have_no_recipe():
    assert json.loads((ROOT / "tests" / "golden" / "experiments.json").read_text()).keys() == PUBLISHED
    assert not all_runs().keys() & PUBLISHED


def test_every_params_json_is_valid():
    runs, remarks = find(ROOT / "experiments" / folder for folder in SHIPPED)
    assert remarks == []
    audits = [run for run, values in all_runs().items() if "checkpoint" in values]
    assert len(runs) >= len(all_runs()) - len(audits) + len(PUBLISHED)
    for run in audits:
        load_params(ROOT / "experiments" / run / "params.json", AUDIT)


def test_the_recipe_of_a_seed_is_what_scripts_seeds_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seeds = [Path("experiments", run) for run in all_runs() if is_seed(Path(run))]
    for experiment in {directory.parent for directory in seeds}:
        experiment.mkdir(parents=True)
        shutil.copy(ROOT / experiment / "params.json", experiment)
    runs, _ = find([Path("experiments")])
    for seed in {directory.name for directory in seeds}:
        siblings = [run for run in runs if run.directory / seed in seeds]
        assert all(write(run, int(seed.removeprefix("seed")), siblings) == (True, []) for run in siblings)
    assert not differing(Path("experiments")).keys() & {directory / "params.json" for directory in seeds}


def test_make_only_writes_missing_or_different_files(tmp_path, capsys):
    published = tmp_path / "CIFAR10/baseline/cnn/params.json"
    published.parent.mkdir(parents=True)
    published.write_text("{}")
    assert make(tmp_path, check=True) == 1
    assert list(tmp_path.rglob("params.json")) == [published]
    assert make(tmp_path, check=False) == 0
    assert capsys.readouterr().out.endswith(f"{len(all_runs())} of {len(all_runs())} files written\n")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("params.json")}
    missing, edited = (tmp_path / run / "params.json" for run in ("GTSRB/abd/clean/teacher", "demo/baseline/net8"))
    shutil.rmtree(missing.parent)
    edited.write_text("{}")
    assert make(tmp_path, check=True) == 1
    assert capsys.readouterr().out.splitlines()[:-1] == [f"missing or different: {file}" for file in (missing, edited)]
    assert edited.read_text() == "{}" and not missing.exists()
    assert make(tmp_path, check=False) == 0
    assert capsys.readouterr().out == f"2 of {len(all_runs())} files written\n"
    assert {file for file in before if file.stat().st_mtime_ns != before[file]} == {missing, edited}
    assert make(tmp_path, check=True) == 0
    assert published.read_text() == "{}"


def test_make_names_unknown_files_but_no_seeds_of_known_runs(tmp_path, capsys):
    for run in ("mine", "mine/seed1", "demo/baseline/net8/seed1", "CIFAR10/baseline/cnn/seed7"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "params.json").write_text("{}")
    assert unknown(tmp_path) == [tmp_path / "mine" / "params.json", tmp_path / "mine" / "seed1" / "params.json"]
    make(tmp_path, check=True)
    assert f"no recipe, and not published: {tmp_path / 'mine' / 'params.json'}\n" in capsys.readouterr().out


def test_make_only_needs_python():
    code = "import sys, experiments.make; sys.exit(bool({'torch', 'numpy', 'pydantic', 'utils'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
