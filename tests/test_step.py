"""A step in its fast forms is the step as it is written."""
import pytest
import torch
from conftest import results
from torch import nn

from model import build_model
from utils import seeds
from utils.data import Images, TrainBatches
from utils.losses import kd_terms
from utils.params import KDParams
from utils.step import GraphedStep, Step, compiled
from utils.training import Frozen, build_optimizer

KD = {"dataset": "demo", "model_name": "preresnet20", "learning_rate": 0.01, "num_epochs": 1, "teacher_model": "net",
      "teacher_resume": "x", "temperature": 4, "alpha": 0.9}


def batches(device="cpu", count=100):
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=seeds.generator("step"))
    part = Images(pixels, torch.arange(count) % 5, torch.full((3,), 0.5), torch.full((3,), 0.25))
    return TrainBatches(Images(*(tensor.to(device) for tensor in vars(part).values())), 16, "crop_flip", seed=0)


def network(seed, device="cpu", name="net"):
    torch.manual_seed(seed)
    return build_model(name, 5, num_channels=8).to(device, memory_format=torch.channels_last)


def make(device="cpu", transform=None):
    """A distillation step from the same beginning each time: the student, and the step."""
    student, teacher = network(0, device, "preresnet20"), Frozen(network(1, device))

    def loss(student, batch):
        return kd_terms(student(batch.images), teacher(batch), batch.labels, temperature=4, alpha=0.9)
    optimizer = build_optimizer(KDParams(**KD), student)
    step = Step(student, transform(loss) if transform else loss, optimizer, batches(device), torch.float32)
    return student, step


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


def test_where_the_compiler_fails_one_line_says_so_and_the_step_is_as_written(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler here\nat all")
    monkeypatch.setattr(torch, "compile", lambda loss, **_: fail)
    said = []
    _, step = make(transform=lambda loss: compiled(loss, said.append))
    assert torch.equal(run(step), run(make()[1]))
    assert said == ["compile: not used, the compiler fails (no compiler here)"]


def test_an_error_of_the_loss_itself_is_not_blamed_on_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **_: lambda *arguments: loss(*arguments))

    def broken(network, batch):
        raise ZeroDivisionError
    said = []
    with pytest.raises(ZeroDivisionError):
        compiled(broken, said.append)(None, None)
    assert not said


def test_where_a_step_cannot_be_recorded_one_line_says_so_and_the_steps_are_as_written(monkeypatch):
    class Nothing:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_stream(self, _):
            pass

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")
    for name in ("Stream", "CUDAGraph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    said = []
    assert torch.equal(run(GraphedStep(make()[1], said.append)), run(make()[1]))
    line, = said
    assert line.startswith("cuda_graph: steps run as written")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_the_step_as_it_is_written():
    torch.backends.cudnn.deterministic = True
    student, step = make("cuda")
    expected = run(step, epochs=8)
    replayed, other = make("cuda")
    said = []
    graphed = GraphedStep(other, said.append)
    torch.testing.assert_close(run(graphed, epochs=8), expected, rtol=1e-3, atol=1e-4)
    assert not said
    assert set(graphed.graphs) == {16, 4}
    torch.testing.assert_close(replayed.state_dict(), student.state_dict(), rtol=1e-2, atol=1e-3)


def test_the_switches_of_speed_may_change_under_a_run(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert call("train_scratch", directory, "--set", "num_epochs=2", "cuda_graph=1").returncode == 0
    assert results(directory)["last"]["epoch"] == 2
    assert "cuda_graph: steps run as written" in (directory / "training.log").read_text()
