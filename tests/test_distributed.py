"""A run on two processes (gloo, CPU) equals the run on one process, within float tolerance."""
import csv
import fcntl
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, environment, results

from utils import checkpoint, launcher
from utils.device import choose_device
from utils.errors import UserError


def torchrun(directory, script="train_scratch", *arguments):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(words + command(script, directory, *arguments)[1:], env=environment(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rows(directory):
    with open(directory / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_close(one, two):
    a, b = (checkpoint.load(directory / "last_model.tar").state_dict for directory in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    for row, other in zip(rows(one), rows(two), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(call, experiment):
    """45 images in batches of 8: the last batch of 5 is shared as 2 and 3. PreResNet: batch statistics everywhere."""
    params = {"model_name": "preresnet20", "learning_rate": 0.001}
    alone, shared = experiment("alone", **params), experiment("shared", **params)
    assert call("train_scratch", alone).returncode == 0
    done = torchrun(shared)
    assert_close(alone, shared)
    assert results(shared)["processes"] == 2
    assert done.stdout.count("epoch 2/2") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "calls"), [("views", [["--set", "num_epochs=1"], []]), ("once", [[]])])
def test_a_student_of_a_frozen_teacher_on_two_processes_continues_after_a_stop(call, experiment, queries, calls):
    teacher = experiment("teacher", num_epochs=1)
    assert call("train_scratch", teacher).returncode == 0
    params = {"model_name": "preresnet20", "learning_rate": 0.001, "num_epochs": 2, "temperature": 4, "alpha": 0.9,
              "teacher_model": "net", "teacher_num_channels": 4, "teacher_resume": str(teacher / "best_model.tar"),
              "queries": queries}
    alone, shared = experiment("alone", **params), experiment("shared", **params)
    assert call("train_kd", alone).returncode == 0
    for arguments in calls:
        torchrun(shared, "train_kd", *arguments)
    assert_close(alone, shared)


@pytest.mark.slow
def test_synchronized_batch_norm_of_one_process_is_that_of_torch(tmp_path):
    """Outputs, gradients and running statistics, for 2-D and 4-D inputs."""
    import torch.distributed as dist

    from utils.distributed import _SyncBatchNorm
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for shape in ((6, 5), (6, 5, 4, 4)):
            own = torch.nn.BatchNorm2d(5) if len(shape) == 4 else torch.nn.BatchNorm1d(5)
            torch.nn.init.normal_(own.weight)
            ours = _SyncBatchNorm.from_batch_norm(type(own)(5))
            ours.load_state_dict(own.state_dict())
            x, weights = torch.randn(shape), torch.randn(shape)
            grads = []
            for layer in (own, ours):
                inputs = x.clone().requires_grad_()
                output = layer(inputs)
                (output * weights).sum().backward()
                grads.append((output.detach(), inputs.grad, layer.weight.grad, layer.bias.grad))
            torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dict(own.state_dict()), dict(ours.state_dict()))
            torch.testing.assert_close(own.eval()(x), ours.eval()(x))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_non_finite_values_end_all_processes_with_one_line(experiment):
    directory = experiment(num_epochs=3, schedule=[1], gamma=1e30)
    done = launched(directory)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert "epoch 2, step " in line


def launched(directory, script="train_scratch"):
    """Start two processes like --gpu_id, but on the CPU."""
    code = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); from utils import launcher; " \
           "launcher.launch(2)"
    return subprocess.run([sys.executable, "-c", code, *command(script, directory)[1:]],
                          env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_processes_of_gpu_id_are_those_of_torchrun(call, experiment):
    alone, shared = experiment("alone"), experiment("shared")
    assert call("train_scratch", alone).returncode == 0
    done = launched(shared)
    assert done.returncode == 0, done.stderr
    assert results(shared)["processes"] == 2
    assert rows(shared) == [pytest.approx(row, rel=1e-2, abs=1e-2) for row in rows(alone)]


@pytest.mark.slow
def test_bad_input_of_several_processes_is_one_line(experiment):
    done = launched(experiment(model_name="resnet19"))
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert "resnet19" in line


@pytest.mark.slow
def test_a_method_without_data_refuses_several_processes(experiment):
    done = launched(experiment(), "train_datafree")
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert "single device" in line


@pytest.mark.slow
def test_an_error_of_the_first_process_ends_all_with_one_line(experiment):
    done = launched(experiment(dataset="folder:/no/such/place"))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "/no/such/place" in done.stderr
    directory = experiment()
    handle = os.open(directory, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    done = launched(directory)
    os.close(handle)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "another process is training" in done.stderr


@pytest.mark.parametrize("device, gpu_ids, environ, expected", [
    ("auto", None, {}, "cuda:0"),
    ("cuda", None, {}, "cuda:0"),
    ("cuda:3", None, {}, "cuda:3"),
    ("auto", [2], {}, "cuda:2"),
    ("auto", [2, 0], {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:0"),
    ("auto", None, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, "cuda:3"),
    ("cpu", None, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cpu"),
])
def test_each_process_uses_its_gpu(monkeypatch, device, gpu_ids, environ, expected):
    four_gpus(monkeypatch, environ)
    assert str(choose_device(device, gpu_ids, cuda=True)) == expected


def test_cuda_0_means_the_cpu_unless_the_command_line_asks_for_a_gpu(monkeypatch):
    four_gpus(monkeypatch, {})
    assert str(choose_device("auto", None, cuda=False)) == "cpu"
    assert str(choose_device("cuda", None, cuda=False)) == "cuda:0"


def test_several_gpu_ids_start_a_process_each(monkeypatch):
    four_gpus(monkeypatch, {})
    started = []
    monkeypatch.setattr(launcher, "launch", started.append)
    choose_device("auto", [1, 3], cuda=True)
    assert started == [2]


@pytest.mark.parametrize("gpu_ids, environ, words", [
    ([0, 7], {}, "GPU 7 does not exist, there are 4"),
    ([1, 1], {}, "given twice"),
    ([0], {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "2 processes for 1 GPU"),
])
def test_gpus_that_do_not_fit_are_an_error(monkeypatch, gpu_ids, environ, words):
    four_gpus(monkeypatch, environ)
    with pytest.raises(UserError, match=words):
        choose_device("auto", gpu_ids, cuda=True)


def four_gpus(monkeypatch, environ):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
