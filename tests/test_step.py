"""Fast forms of a step equal the plain step."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CpuGraphs, results
from torch import nn

from model import build_model
from runs.stages import KD as KD_STAGE
from utils import seeds, supervised
from utils.data import Images, TrainBatches
from utils.evaluation import Frozen
from utils.losses import kd_terms
from utils.step import CompiledStep, GraphedStep, Step
from utils.supervised import build_optimizer

KD = {"dataset": "demo", "model_name": "preresnet20", "learning_rate": 0.01, "num_epochs": 1, "teacher_model": "net",
      "teacher_resume": "x", "temperature": 4, "alpha": 0.9}


def batches(device="cpu", count=100):
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=seeds.generator("step"))
    part = Images(pixels, torch.arange(count) % 5, torch.full((3,), 0.5), torch.full((3,), 0.25))
    return TrainBatches(Images(*(tensor.to(device) for tensor in vars(part).values())), 16, "crop_flip", seed=0)


def network(seed, device="cpu", name="net"):
    torch.manual_seed(seed)
    return build_model(name, 5, num_channels=8).to(device, memory_format=torch.channels_last)


def make(device="cpu", kind=Step, name="preresnet20", dtype=torch.float32, **params):
    """Student and distillation step, with the same initial state at each call."""
    student, teacher = network(0, device, name), Frozen(network(1, device))

    def loss(student, batch):
        return kd_terms(student(batch.images), teacher(batch), batch.labels, temperature=4, alpha=0.9)
    optimizer = build_optimizer(KD_STAGE.params_by("kd")(**KD | {"model_name": name} | params), student)
    return student, kind(student, loss, [optimizer], batches(device), dtype)


def run(step, epochs=3):
    return torch.stack([step(draw, len(draw["index"]))
                        for epoch in range(epochs) for draw in step_batches(step).draws(epoch, step_device(step))])


def step_batches(step):
    return getattr(step, "step", step).batches


def step_device(step):
    return getattr(step, "step", step).device


def test_a_step_is_the_plain_loop_over_float32_batches():
    student, step = make()
    records = run(step)
    plain, teacher = network(0, name="preresnet20").to(memory_format=torch.contiguous_format), network(1).eval()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    numbers = []
    for epoch in range(3):
        for batch in batches().epoch(epoch):
            images = batch.images.contiguous()
            with torch.no_grad():
                answers = teacher(images)
            terms = kd_terms(plain(images), answers, batch.labels, temperature=4, alpha=0.9)
            optimizer.zero_grad()
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), torch.inf)
            optimizer.step()
            numbers.append(torch.stack([*(term.detach() for term in terms.values()), norm]))
    assert len(records) == 21
    assert step.names == ["loss", "kl", "cross_entropy", "gradient_norm"]
    torch.testing.assert_close(records, torch.stack(numbers), rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(student.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_failing_compiler_logs_one_line_and_falls_back(monkeypatch, part):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            if part == "forward":
                raise RuntimeError("no compiler here\nat all")
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no compiler here\nat all")

    def compile(loss, **_):
        return lambda *arguments: {name: Broken.apply(term) for name, term in loss(*arguments).items()}
    monkeypatch.setattr(torch, "compile", compile)
    said = []
    student, step = make(kind=partial(CompiledStep, log=said.append))
    plain, written = make()
    assert torch.equal(run(step), run(written))
    assert said == ["compile: not used, the compiler failed (no compiler here)"]
    torch.testing.assert_close(student.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_an_error_of_the_loss_itself_is_not_blamed_on_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **_: lambda *arguments: loss(*arguments))
    said = []
    _, step = make(kind=partial(CompiledStep, log=said.append))

    def broken(network, batch):
        raise ZeroDivisionError
    step.loss = step.compiled = broken
    with pytest.raises(ZeroDivisionError):
        run(step)
    assert not said


def test_a_step_that_cannot_be_recorded_logs_one_line_and_falls_back():
    class Refusing(CpuGraphs):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")
    said = []
    graphed = run(GraphedStep(make(name="net", learning_rate=RATES[0])[1], said.append, Refusing()))
    assert torch.equal(graphed, run(make(name="net", learning_rate=RATES[0])[1]))
    assert said == ["cuda_graph: not used, the step cannot be recorded (operation not permitted when stream is "
                    "capturing)"]


RATES = 2**-6, 2**-9  # exact in float32, to which a `GraphedStep` rounds them


def run_with_two_rates(step):
    """Eight epochs, the second half at another learning rate, dropout seeded in each."""
    records = []
    for epoch in range(8):
        torch.manual_seed(epoch)
        for group in getattr(step, "step", step).optimizers[0].param_groups:
            group["lr"] = RATES[epoch >= 4]
        records += [step(draw, len(draw["index"])) for draw in step_batches(step).draws(epoch, step_device(step))]
    return torch.stack(records)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_recorded_step_reads_draws_and_learning_rates_from_tensors(optimizer):
    student, step = make(name="net", optimizer=optimizer)
    expected = run_with_two_rates(step)
    replayed, other = make(name="net", optimizer=optimizer)
    said = []
    graphed = GraphedStep(other, said.append, CpuGraphs())
    assert torch.equal(run_with_two_rates(graphed), expected)
    assert set(graphed.graphs) == {16, 4} and not said
    assert [group["lr"] for optimizer in other.optimizers for group in optimizer.param_groups] == [RATES[1]]
    torch.testing.assert_close(replayed.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_eager_and_recorded_steps_read_the_same_tensor_of_the_learning_rate():
    graphed = GraphedStep(make(name="net")[1], print, CpuGraphs())
    optimizer, = graphed.step.optimizers
    read = []
    optimizer.register_step_pre_hook(lambda *_: read.append(optimizer.param_groups[0]["lr"]))
    run_with_two_rates(graphed)
    # 4 steps run Python for full batches and 4 for the smaller one: 3 eager ones and a recording each.
    assert len(read) == 8 and all(rate is graphed.static_rates[0] for rate in read)
    assert read[0].item() == RATES[1]


def test_the_recorder_of_the_tests_keeps_python_values_as_constants():
    tensor, value = torch.ones(()), [1.0]
    replay = CpuGraphs().record(lambda: tensor.add_(value[0]).clone())
    value[0] = 5.0
    assert tensor == 1 and [replay().item(), replay().item()] == [2, 3]
    with pytest.raises(RuntimeError, match="capturing"):
        CpuGraphs().record(lambda: tensor.add_(1) * tensor.item())
    assert tensor == 3


def build(optimizers, cuda_graph, log):
    batches = SimpleNamespace(part=SimpleNamespace(labels=SimpleNamespace(device=torch.device("cuda"))))
    params = KD_STAGE.params_by("kd")(**KD, cuda_graph=cuda_graph)
    return supervised.build_step(nn.Module(), None, optimizers, batches, params, torch.float32, log)


@pytest.mark.parametrize(("cuda_graph", "recorded"), [("auto", False), (0, False), (1, True)])
def test_steps_on_a_gpu_are_recorded_only_on_request(monkeypatch, cuda_graph, recorded):
    monkeypatch.setattr(supervised, "GraphedStep", lambda *_: "recorded")
    said = []
    assert (build([], cuda_graph, said.append) == "recorded") == recorded
    assert said == ["cuda_graph: steps are recorded and replayed"] * recorded


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.SGD, partial(torch.optim.Adam, foreach=True)])
def test_a_step_whose_optimizer_is_not_fused_is_not_recorded(kind):
    said = []
    assert type(build([kind(nn.Linear(1, 1).parameters())], 1, said.append)) is Step
    assert said == ["cuda_graph: not used, an optimizer is not a fused SGD or Adam"]


def test_speed_settings_may_change_during_a_run(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert call("train_scratch", directory, "--set", "num_epochs=2", "cuda_graph=1").returncode == 0
    assert results(directory)["last"]["epoch"] == 2
    assert "cuda_graph: not used" in (directory / "training.log").read_text()
