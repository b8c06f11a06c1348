"""One run on two processes (gloo, CPU) is the run of one process, to float tolerance."""
import csv
import subprocess
import sys

import pytest
import torch
from conftest import command, environment, results

from utils import checkpoint


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


def test_two_processes_train_the_network_of_one(call, experiment):
    """45 images in batches of 8: the last batch of 5 is shared as 2 and 3. PreResNet: batch statistics everywhere."""
    params = {"model_name": "preresnet20", "learning_rate": 0.001, "validation_fraction": 0.2}
    alone, shared = experiment("alone", **params), experiment("shared", **params)
    assert call("train_scratch", alone).returncode == 0
    done = torchrun(shared)
    assert_close(alone, shared)
    assert results(shared)["processes"] == 2
    assert done.stdout.count("epoch 2/2") == 1


def test_a_student_of_a_frozen_teacher_on_two_processes_continues_after_a_stop(call, experiment):
    teacher = experiment("teacher", num_epochs=1)
    assert call("train_scratch", teacher).returncode == 0
    params = {"model_name": "preresnet20", "learning_rate": 0.001, "num_epochs": 2, "temperature": 4, "alpha": 0.9,
              "teacher_model": "net", "teacher_num_channels": 4, "teacher_resume": str(teacher / "best_model.tar")}
    alone, shared = experiment("alone", **params), experiment("shared", **params)
    assert call("train_kd", alone).returncode == 0
    torchrun(shared, "train_kd", "--set", "num_epochs=1")
    torchrun(shared, "train_kd")
    assert_close(alone, shared)


def test_the_synchronised_batch_norm_of_one_process_is_torchs_own(tmp_path):
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
