"""Examples of docs/extending.md, in a copy of the repository: contracts hold, and commands run."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment

TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS, COMMANDS = (re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
                    for language in ("python", "bash"))
# (path, whether the block is appended to it, the block)
FILES = [(path, bool(appended), block) for block in BLOCKS
         for path, appended in re.findall(r"\A# (\S+\.py)(, appended)?\n", block)]
NAMES = ["log_mse", "confidence_penalty", "uniform_mix", "conv4", "bloodmnist", "corner_frame", "gaussian_noise"]
# Not copied: large files, outputs of runs, and experiments that no example needs.
LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "data", "docs", "mine", "CIFAR*", "GTSRB",
                                  "TinyImageNet", "seed[0-9]*", "*.tar", "results.json", "*.csv", "*.log", "events.*")
SHORT = {"train_datafree.py": "num_epochs=1 epoch_steps=2 batch_size=16"}  # others: an epoch of few images


# Runs stages in one process, which imports torch once; takes their command lines as JSON.
DRIVER = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, sys.argv
"""


def stages(script):
    """Stages called by a bash block, as argument lists with a short training."""
    for line in re.findall("^python (train_.*)$", script, re.MULTILINE):
        arguments = shlex.split(line)
        yield [*arguments, *["--set"] * ("--set" not in arguments),
               *SHORT.get(arguments[0], "num_epochs=1 subset_size=64").split()]


def run(directory, *command):
    variables = environment()
    path = f"{Path(sys.executable).parent}:{variables['PATH']}"
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env={**variables, "PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with all examples, and a small file of the data set."""
    copy = tmp_path_factory.mktemp("extended") / "repository"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # not what else a developer keeps here
        for name in filter(None, tracked.stdout.split("\0")):
            if re.match(r"(?!docs/|experiments/)|experiments/(demo|recipes)/|experiments/\w+\.py", name):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
    else:
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    for path, appended, block in FILES:
        assert (copy / path).exists() == appended, path
        with (copy / path).open("a") as file:
            file.write("\n\n" * appended + block)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 16)):
        arrays[f"{part}_images"] = random.integers(256, size=(count, 28, 28, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = random.integers(8, size=(count, 1), dtype=np.uint8)
    (copy / "data").mkdir()
    np.savez(copy / "data" / "bloodmnist.npz", **arrays)
    return copy


def test_every_kind_has_an_example_and_a_contract_test():
    assert len(FILES) == len(NAMES) == len(COMMANDS) - 1
    for name, (path, _, block), script in zip(NAMES, FILES, COMMANDS[1:], strict=True):
        assert f'register("{name}"' in block and all(len(line) <= 120 for line in block.splitlines()), path
        assert f"python -m pytest tests/test_contracts.py -k {name}\n" in script


@pytest.mark.slow
def test_the_examples_keep_their_contracts_and_the_style(repository):
    told = run(repository, sys.executable, "-m", "pytest", "-vv", "tests/test_contracts.py", "-k", " or ".join(NAMES))
    assert all(re.search(rf"\[\S*{name}\S*\] PASSED", told) for name in NAMES), told
    run(repository, sys.executable, "-m", "ruff", "check", *[path for path, _, _ in FILES])


@pytest.mark.slow
def test_the_commands_of_the_examples_run(repository):
    for script in COMMANDS:
        run(repository, "bash", "-euc", re.sub("^python .*", "", script, flags=re.MULTILINE))
    calls = [call for script in COMMANDS for call in stages(script)]
    assert len(calls) == 1 + len(NAMES)
    run(repository, sys.executable, "-c", DRIVER, json.dumps(calls))
    for name in NAMES:
        results = json.loads((repository / "experiments" / "mine" / name / "results.json").read_text())
        assert results["last"]["epoch"] == 1 and name in json.dumps(results["params"]), name


@pytest.mark.slow
def test_help_and_schema_contain_the_examples(repository):
    told = run(repository, sys.executable, "train_kd.py", "--help")
    assert "log_mse" in told and "uniform_mix" in told
    assert "epoch_steps" in run(repository, sys.executable, "-m", "utils.params", "datafree", "gaussian_noise")
