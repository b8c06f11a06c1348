"""scripts/check_gpu.py: without a GPU it ends with one line; its comparisons pass and fail as they should.

A recorder that calls the step takes the place of CUDA graphs.
"""
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, CpuGraphs, environment

from scripts import check_gpu
from utils.step import GraphedStep

CASE = check_gpu.Case("net", "kd", torch.float32, torch.device("cpu"))
TOLERANCE = check_gpu.RECORDED_TOLERANCE


def faithful(step, log):
    return GraphedStep(step, log, CpuGraphs())


def test_without_a_gpu_it_ends_with_one_line_and_status_2():
    call = [sys.executable, str(ROOT / "scripts/check_gpu.py")]
    done = subprocess.run(call, capture_output=True, text=True, env={**environment(), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and not done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("error: scripts/check_gpu.py needs a GPU")


def test_every_family_of_the_zoo_is_compared():
    families = check_gpu.families()
    assert {"net", "mlp", "resnet18", "preresnet20", "wrn16_1"} <= set(families)
    assert len(families) == len({type(check_gpu.build_model(name, 10)) for name in families})


@pytest.mark.parametrize("stage", check_gpu.STAGES)
def test_a_faithful_recorder_passes(stage):
    case = CASE._replace(stage=stage)
    result, = check_gpu.compare(case, {"recorded": (faithful, TOLERANCE)})
    assert str(result) == f"passed  recorded, {case}: no difference"


def test_a_tensor_may_differ_by_the_noise_of_two_eager_trainings(monkeypatch):
    noise = iter([{"noisy": 0.2, "exact": 0.0}, {"noisy": 0.7, "exact": 0.0}, {"noisy": 0.7, "exact": 2e-4}])
    monkeypatch.setattr(check_gpu, "train", lambda *_, **__: ({}, []))
    monkeypatch.setattr(check_gpu, "difference", lambda *_: next(noise))
    first, second = check_gpu.compare(CASE, dict.fromkeys(("first", "second"), (faithful, TOLERANCE)))
    assert first.passed and not second.passed
    assert second.detail == "difference 2.0e-04 (exact), allowed 1.0e-04"


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASE._replace(optimizer="sgd"), CASE._replace(name="mlp", dtype=torch.bfloat16)],
                         ids=str)
def test_a_faithful_recorder_passes_with_sgd_and_in_bfloat16(case):
    assert all(result.passed for result in check_gpu.compare(case, {"recorded": (faithful, TOLERANCE)}))


class KeepsTheOldRate(GraphedStep):
    """Records the learning rate as a constant."""

    def _update_rates(self):
        if not self.graphs:
            super()._update_rates()


class IgnoresTheSmallerBatch(GraphedStep):
    """Updates the draw of full batches only, so a smaller batch repeats the recorded one."""

    def __call__(self, draw, size):
        stale = size < CASE.batch_size and size in self.graphs
        return super().__call__(self.graphs[size][1] if stale else draw, size)


class DropsBufferUpdates(CpuGraphs):
    """Replays everything except the updates of buffers, such as the statistics of batch normalization."""

    def __init__(self, network):
        self.network = network

    def record(self, function):
        def replay():
            before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
            result = function()
            for buffer, value in before:
                buffer.copy_(value)
            return result
        return replay


def without_optimizer_state(step, log):
    for optimizer in step.optimizers:  # empty before the first epoch, loaded after an interruption
        optimizer.state.clear()
    return faithful(step, log)


def not_recorded(step, log):
    class Refuses(CpuGraphs):
        def record(self, function):
            raise RuntimeError("not permitted")
    return GraphedStep(step, log, Refuses())


WRONG = {
    "keeps the old learning rate": lambda step, log: KeepsTheOldRate(step, log, CpuGraphs()),
    "ignores the smaller batch": lambda step, log: IgnoresTheSmallerBatch(step, log, CpuGraphs()),
    "drops buffer updates": lambda step, log: GraphedStep(step, log, DropsBufferUpdates(step.network)),
    "loses the optimizer state": without_optimizer_state,
    "is not recorded": not_recorded,
}


def test_each_wrong_recorder_fails():
    results = list(check_gpu.compare(CASE, {name: (factory, TOLERANCE) for name, factory in WRONG.items()}))
    assert [result.check for result in results] == [f"{name}, {CASE}" for name in WRONG]
    assert not [result.check for result in results if result.passed]
    assert "running_" in results[2].detail or "num_batches_tracked" in results[2].detail
    assert "cuda_graph: not used" in results[4].detail


def test_an_exception_is_a_failure(capsys):
    def raising(step, log):
        raise RuntimeError("misaligned address\nmore")
    check = partial(check_gpu.compare, CASE._replace(name="mlp"), {"recorded": (raising, TOLERANCE)})
    assert not check_gpu.passes("name", check)
    assert capsys.readouterr().out == "FAILED  name: RuntimeError: misaligned address\n"


def test_the_images_lie_on_the_device_as_uint8():
    images, steps = check_gpu.check_placement(CASE, faithful)
    assert images.passed and images.detail == "uint8 on cpu" and steps.passed
