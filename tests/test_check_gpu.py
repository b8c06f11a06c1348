"""scripts/check_gpu.py: without a GPU it ends with one line; its comparisons pass and fail as they should.

A recorder for the CPU takes the place of CUDA graphs.
"""
import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, CpuGraphs, environment

import attacks
import defenses
from scripts import check_gpu
from utils.step import GraphedStep

CASE = check_gpu.Case("net", "kd", torch.float32, torch.device("cpu"), num_channels=8)
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


QUICK = "scratch", "mkd", "skeptical", "moving"  # a second optimizer, warm-up by epochs, a second network


@pytest.mark.parametrize("method", [
    *QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in (*attacks.REGISTRY, *defenses.REGISTRY)
              if name not in QUICK)])
def test_a_faithful_recorder_passes(method):
    case = CASE._replace(method=method)
    result, = check_gpu.compare(case, {"recorded": (faithful, TOLERANCE)})
    assert str(result) == f"passed  recorded, {case}: no difference"


@pytest.mark.parametrize("found, passed, detail", [
    ({"noisy": 0.7, "exact": 0.0}, True, "difference 7.0e-01 (noisy), allowed 8.0e-01"),
    ({"noisy": 0.7, "exact": 2e-4}, False, "difference 2.0e-04 (exact), allowed 1.0e-04"),
    ({"noisy": 0.9, "exact": 0.0}, False, "difference 9.0e-01 (noisy), allowed 8.0e-01"),
    ({"noisy": 0.0, "exact": 0.0}, True, "no difference")])
def test_each_tensor_may_differ_by_four_times_its_noise_or_the_tolerance(found, passed, detail):
    assert check_gpu.judge(found, {"noisy": 0.2, "exact": 0.0}, TOLERANCE) == (passed, detail)


@pytest.mark.parametrize("method", ["bayes", "ddae_plus"])
def test_attacks_that_undo_an_answer_defense_are_trained_on_recovered_answers(method):
    learner = CASE._replace(method=method).learner(faithful, print)
    learner.epoch(0, "")
    assert learner.method.recovered is not None


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
        recording = super().record(function)

        def replay():
            before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
            result = recording()
            for buffer, value in before:
                buffer.copy_(value)
            return result
        return replay


class LoadsAStateTooLate(GraphedStep):
    """Replaces the tensors of the optimizer state after the first recording, which updates the old ones."""

    def _record(self, draw, size):
        super()._record(draw, size)
        for optimizer in self.step.optimizers if len(self.graphs) == 1 else ():
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


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
    "loads a state too late": lambda step, log: LoadsAStateTooLate(step, log, CpuGraphs()),
    "loses the optimizer state": without_optimizer_state,
    "is not recorded": not_recorded,
}


def test_each_wrong_recorder_fails():
    results = list(check_gpu.compare(CASE, {name: (factory, TOLERANCE) for name, factory in WRONG.items()}))
    assert [result.check for result in results] == [f"{name}, {CASE}" for name in WRONG]
    assert not [result.check for result in results if result.passed]
    assert "running_" in results[2].detail or "num_batches_tracked" in results[2].detail
    assert "cuda_graph: not used" in results[-1].detail


def test_the_rounding_of_bfloat16_counts_as_noise_of_a_compiled_step():
    """A step that computes in float32 differs from one in bfloat16 by the rounding."""
    def in_float32(step, log):
        step.dtype = torch.float32
        return step
    case = CASE._replace(name="mlp", dtype=torch.bfloat16, dropout_rate=0, optimizer="sgd")
    tests = {"float32": (in_float32, TOLERANCE)}
    strict, = check_gpu.compare(case, tests)
    tolerant, = check_gpu.compare(case, tests, rounding=True)
    assert not strict.passed and tolerant.passed


def compiled_to(change):
    """Factory of a compiled step whose compiler changes the terms of the loss."""
    def factory(step, log):
        compiled, loss = check_gpu.compiled(step, log), step.loss
        compiled.compiled = lambda *arguments: change(loss(*arguments))
        return compiled
    return factory


@pytest.mark.parametrize("name", ["mlp", pytest.param("net", marks=pytest.mark.slow)])
def test_a_compiled_step_passes_in_bfloat16_unless_it_computes_wrongly(name):
    def smaller_gradient(terms):
        return {name: 0.9 * value + 0.1 * value.detach() for name, value in terms.items()}

    def without_labels(terms):
        return {**terms, "loss": terms["loss"] - 0.1 * terms["cross_entropy"]}
    factories = {"right": compiled_to(dict), "recorded": lambda step, log: faithful(compiled_to(dict)(step, log), log),
                 "smaller gradient": compiled_to(smaller_gradient), "without labels": compiled_to(without_labels)}
    tests = {name: (factory, check_gpu.COMPILED_TOLERANCE) for name, factory in factories.items()}
    case = CASE._replace(name=name, dtype=torch.bfloat16, dropout_rate=0, optimizer="sgd")
    assert [result.passed for result in check_gpu.compare(case, tests, rounding=True)] == [True, True, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("factory, fallback", [(check_gpu.recorded, False), (check_gpu.unrecordable, True)])
def test_on_a_gpu_a_recorded_step_equals_the_step_as_written(factory, fallback):
    case = CASE._replace(device=torch.device("cuda"))
    result, = check_gpu.compare(case, {"recorded": (factory, TOLERANCE)}, fallback=fallback)
    assert result.passed, result


def test_an_exception_is_a_failure(capsys):
    def raising(step, log):
        raise RuntimeError("misaligned address\nmore")
    check = partial(check_gpu.compare, CASE._replace(name="mlp"), {"recorded": (raising, TOLERANCE)})
    assert not check_gpu.passes("name", check)
    assert capsys.readouterr().out == "FAILED  name: RuntimeError: misaligned address\n"


def test_the_images_lie_on_the_device_as_uint8_and_a_step_that_falls_back_fails():
    images, steps = check_gpu.check_placement(CASE, not_recorded)
    assert images.passed and images.detail == "uint8 on cpu" and not steps.passed


def test_a_step_that_cannot_be_recorded_must_fall_back(monkeypatch):
    monkeypatch.setattr(check_gpu, "recorded", faithful)
    tests = {"waits": (check_gpu.unrecordable, TOLERANCE), "recorded": (faithful, TOLERANCE)}
    waits, recorded = check_gpu.compare(CASE, tests, fallback=True)
    assert waits.passed and "no difference; cuda_graph: not used" in waits.detail
    assert not recorded.passed
