"""Fixtures for tests of whole runs: small data, experiment directories, and stages called like a user calls them."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from runs.directories import is_audit, is_seed
from utils import checkpoint

ROOT = Path(__file__).parents[1]
COMMITTED = ("CIFAR10_short", "CIFAR10_20epochs", "CIFAR10_foreign")  # their results are in the repository
# Experiments of the repository by name, without those that a user added.
EXPERIMENTS = {str(path.parent.relative_to(ROOT / "experiments")): json.loads(path.read_text())
               for shipped in ("CIFAR10", *COMMITTED, "CIFAR100", "GTSRB", "TinyImageNet", "demo")
               for path in sorted((ROOT / "experiments" / shipped).rglob("params.json"))
               if not is_seed(path.parent) and not is_audit(path)}
torch.set_num_threads(1)  # like the processes that the tests start: equal summation order, so equal bits
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for background jobs
FEW = {"num_channels": 4, "learning_rate": 0.001, "batch_size": 8, "num_epochs": 2, "precision": "fp32"}


def pytest_collection_modifyitems(items):
    """Run the longest test first; as the last one, it would run while all other workers are idle."""
    items.sort(key=lambda item: item.originalname != "test_one_experiment_of_each_kind_takes_a_step")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder data set: 3 classes of noisy solid colors, 45 training and 15 test images of 32x32 pixels."""
    root = tmp_path_factory.mktemp("data") / "colours"
    random = np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 5)):
        for label, color in enumerate(("blue", "green", "red")):
            folder = root / part / color
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def experiment(tmp_path, data):
    """`experiment(name, **params)` writes a directory with the params.json of a small `net` on the small data."""
    def write(name="run", **params):
        directory = tmp_path / name
        directory.mkdir(parents=True, exist_ok=True)
        params = {"model_name": "net", "dataset": f"folder:{data}", **FEW, **params}
        (directory / "params.json").write_text(json.dumps(params))
        return directory
    return write


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(script, directory, *arguments):
    return [sys.executable, str(ROOT / f"{script}.py"), "--save_path", str(directory), "--device", "cpu",
            "--data_dir", str(Path(directory).parent / "data"), *map(str, arguments)]


@pytest.fixture
def stage():
    """`stage("train_kd", directory, ...)` runs a stage in its own process."""
    def run(script, directory, *arguments, check=True, **options):
        done = subprocess.run(command(script, directory, *arguments), capture_output=True, text=True,
                              env=environment(), **options)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """`call("train_kd", directory, ...)` runs a stage in this process: its exit status, stdout and stderr."""
    def run(script, directory, *arguments):
        from importlib import import_module

        from utils.cli import main
        monkeypatch.setattr(sys, "argv", command(script, directory, *arguments)[1:])
        capsys.readouterr()
        status = 0
        try:
            main(getattr(import_module(script), script))
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)
    return run


class CpuGraphs:
    """Recorder on the CPU that works like CUDA graphs: a replay repeats the operations of the recording on the tensors
    of the recording and runs no Python, so Python values are constants."""

    def run(self, function):
        return function()

    def record(self, function):
        state, operations = torch.get_rng_state(), _Operations()
        try:
            with operations:
                result = function()
        finally:  # as if nothing had been computed
            torch.set_rng_state(state)
            for storage, before in operations.existing.values():
                storage.copy_(before)

        def replay():
            with torch.inference_mode():  # frozen networks compute inference tensors
                for operation, args, kwargs, outputs in operations.steps:
                    values = tree_leaves(operation(*args, **kwargs))
                    for place, tensor in outputs:
                        tensor.copy_(values[place])
            return result
        return replay


class _Operations(TorchDispatchMode):
    """Records operations with their arguments and new outputs, and copies of all memory that existed before."""

    def __init__(self):
        super().__init__()
        self.steps, self.existing, self.created = [], {}, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.existing.keys() | self.created.keys():
                    self.existing[storage._cdata] = storage, storage.clone()
        args, result, outputs = tree_map(lambda value: value, args), operation(*args, **kwargs), []
        for place, tensor in enumerate(tree_leaves(result)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.existing.keys() | self.created.keys():  # not a view, not in place
                    self.created[storage._cdata] = storage
                    outputs.append((place, tensor))
        self.steps.append((operation, args, kwargs, outputs))
        return result


def results(directory):
    return json.loads((directory / "results.json").read_text())


def same_to_the_bit(whole, parts):
    """Content of the last checkpoint of two runs; asserts that both are equal bit for bit."""
    one, two = (checkpoint.load(directory / "last_model.tar").content for directory in (whole, parts))
    for part in ("state_dict", "optim_dict", "learner", "history"):
        assert _leaves(one[part]) == _leaves(two[part]), part
    return one


def _leaves(value):
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key])]
    if isinstance(value, list):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


def contents(directory):
    """Bytes of every file of a directory by name; empty if the directory does not exist."""
    files = directory.iterdir() if directory.is_dir() else ()
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def refused(run, script, directory, *arguments):
    """The line on stderr of a stage; asserts exit status 2 and an unchanged directory."""
    before = contents(directory)
    done = run(script, directory, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    line, = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert contents(directory) == before
    return line


def all_end(session, seconds=30.0):
    """True if all processes of a session end within `seconds`, including forked ones."""
    end = time.monotonic() + seconds
    while _members(session) and time.monotonic() < end:
        time.sleep(0.05)
    return not _members(session)


def _members(session):
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = file.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # the process has ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(file.parent.name))
    return found


class Malicious:
    """Object that creates a directory when `pickle.load` reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
