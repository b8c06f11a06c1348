"""Check on a GPU that recorded and compiled training steps compute what the step as written does, and time all three.

    python scripts/check_gpu.py                              # one network of each family, every attack and defense
    python scripts/check_gpu.py --models net preresnet20     # only these; attacks and defenses are checked with `net`

Exit status: 0 if all checks passed, 1 if one failed, 2 without a GPU.

A comparison trains a network for 10 short epochs on random images with the learner of the stages, with dropout, a
smaller last batch and changes of the learning rate: twice with the step as written ("eager"), and once with the step
under test. The latter is interrupted in the middle: its state goes through a checkpoint file into a new learner and a
new step. Each half has replays of both batch sizes. Compared are weights and buffers of the network and the method at
the end, and losses and gradient norms (vectors over the epochs), by ||a - b|| / ||b||. The two eager trainings differ
by the noise floor: 0 if all kernels are deterministic, more if atomic additions make the order of sums random. The step
under test passes if no tensor differs from that of the first eager training by more than max(4 * noise floor of this
tensor, tolerance); 4, since two samples are a rough estimate.

- recorded: tolerance 1e-4. A graph replays the kernels of the eager step, so 0 is expected. If a library chooses
  another algorithm during the recording, rounding changes (1e-7 per operation), which training amplifies. `GraphedStep`
  rounds learning rates to float32, so all rates here are exact in float32.
- compiled, compiled and recorded: tolerance 1e-2. Fused kernels round differently, so in bfloat16 the noise floor is at
  least the difference of an eager training in float32. Without dropout, of which the compiler draws other masks, and
  with SGD: Adam turns the rounding errors of gradients that are 0 (biases before batch normalization) into full steps.

A step that falls back to the eager one fails. Further checks: a step that cannot be recorded falls back and trains
correctly; the images lie on the device as uint8; no step waits for the device; if there are two GPUs, two processes
train like one.
"""
from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import attacks
import defenses
from defenses.answers import build_answers
from model import MODEL_NAMES, build_model
from model.registry import REGISTRY
from runs.stages import KD, NASTY, KDParams, NastyParams, ScratchParams
from utils import checkpoint, seeds
from utils.cli import Parser, main
from utils.data import Batch, Images, TrainBatches
from utils.device import choose_dtype, prepare_device
from utils.errors import UserError, first_line
from utils.evaluation import Frozen, Queries
from utils.losses import cross_entropy
from utils.method import Method
from utils.params import DataParams
from utils.step import CompiledStep, GraphedStep, Step
from utils.supervised import Supervised

CLASSES = 10
METHODS = "scratch", "nasty", "kd"  # for every network; `net` is trained with all attacks and defenses too
PARAMETERS: dict[str, dict[str, Any]] = {  # of methods, other than the defaults
    **{name: {"queries": "once", "answer_defense": "mad:0.5", "pairs": 1000} for name in ("bayes", "ddae_plus")},
    "moving": {"student_learning_rate": 2**-6},
    "skeptical": {"delay": 3}}  # its heads are trained from epoch 4 on, when both batch sizes are recorded
SCHEDULE, RESUMED, EPOCHS = (4, 9), 5, 10  # epochs of new learning rates and of the interruption; number of epochs
FACTOR, RECORDED_TOLERANCE, COMPILED_TOLERANCE = 4, 1e-4, 1e-2
COMPILED, TIMED = ("net",), ("net", "resnet18")  # few, since a network takes up to a minute to compile

Log = Callable[[str], None]
Factory = Callable[[Step, Log], Any]  # (step as written, log of fallbacks) -> step under test


def eager(step: Step, _: Log) -> Step:
    return step


def recorded(step: Step, log: Log) -> GraphedStep:
    return GraphedStep(step, log)


def compiled(step: Step, log: Log) -> CompiledStep:
    torch.compiler.reset()  # the limit of compilations counts all networks of a process
    return CompiledStep(step.network, step.loss, step.optimizers, step.batches, step.dtype, step.method, log=log)


def compiled_and_recorded(step: Step, log: Log) -> GraphedStep:
    return recorded(compiled(step, log), log)


def unrecordable(step: Step, log: Log) -> GraphedStep:
    """Recorded step whose loss waits for the device."""
    loss = step.loss

    def waiting(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = loss(network, batch)
        terms["loss"].item()
        return terms
    step.loss = waiting
    return recorded(step, log)


KINDS: tuple[Factory, ...] = eager, recorded, compiled


class Case(NamedTuple):
    """Training to compare. By default, an epoch has two batches of 16 images and one of 6."""

    name: str
    method: str  # "scratch", an attack or a trained-in defense
    dtype: torch.dtype
    device: torch.device
    batch_size: int = 16
    num_images: int = 38
    num_channels: int = 32  # of the family `net`
    dropout_rate: float = 0.2  # of the family `net`
    optimizer: Literal["auto", "sgd"] = "auto"

    def __str__(self) -> str:
        return f"{self.name}, {self.method}, {str(self.dtype).removeprefix('torch.')}"

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = build_model(self.name, CLASSES, num_channels=self.num_channels, dropout_rate=self.dropout_rate)
        return network.to(self.device).to(memory_format=torch.channels_last)

    def params(self) -> DataParams:
        adam = (REGISTRY[self.name].optimizer, self.optimizer) == ("adam", "auto")
        rate = 100 * 2**(-17 if adam else -13)  # 0.0008, 0.012; a hundredth is exact in float32 too, as `mkd` needs
        given = {"dataset": "demo", "model_name": self.name, "learning_rate": rate, "schedule": list(SCHEDULE),
                 "gamma": 0.25, "batch_size": self.batch_size, "num_epochs": EPOCHS, "optimizer": self.optimizer,
                 "compile": False, "cuda_graph": False, **PARAMETERS.get(self.method, {})}
        if self.method == "scratch":
            return ScratchParams(**given)
        stage = KD if self.method in attacks.REGISTRY else NASTY
        kind = stage.params_by(self.method)
        required = {key: self.name for key, field in kind.model_fields.items() if field.is_required()}
        params = kind(**required | given | {stage.key: self.method})  # checkpoints are not read
        assert isinstance(params, DataParams)
        return params

    def learner(self, factory: Factory, log: Log, state: Mapping[str, Any] | None = None) -> Supervised:
        """Learner with the step under test. state: content of a checkpoint to continue from."""
        prepare_device(self.device, "bf16" if self.dtype == torch.bfloat16 else "fp32")
        pixels = torch.randint(256, (self.num_images, 32, 32, 3), generator=seeds.generator("check")).byte()
        tensors = pixels, torch.arange(self.num_images) % CLASSES, torch.full((3,), 0.5), torch.full((3,), 0.25)
        batches = TrainBatches(Images(*(tensor.to(self.device) for tensor in tensors)), self.batch_size, "crop_flip", 0)
        params, other = self.params(), Frozen(self.network(1))  # adversary, or teacher
        method: Method | None = None
        if isinstance(params, ScratchParams):
            def loss(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
                return {"loss": cross_entropy(network(batch.images), batch.labels)}
        elif isinstance(params, NastyParams):
            kind = defenses.REGISTRY[self.method]
            loss = method = kind.from_run(params, CLASSES, **dict.fromkeys(kind.frozen_roles, other))
        else:
            assert isinstance(params, KDParams)
            attack = method = attacks.REGISTRY[self.method].from_run(params, CLASSES)
            other.answers, other.queries = build_answers(params), Queries(params.queries == "once", params.views)
            attack.await_answers(other, lambda _: None)
            other.prepare("", CLASSES, batches, self.dtype, None, log)

            def loss(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
                return attack(network, batch, other(batch))
        learner = Supervised(self.network(0), loss, batches, params, self.dtype, method, other.start_epoch)
        if state:
            learner.network.load_state_dict(state["state_dict"])
            learner.load_state_dict(dict(state))
        learner.setup(log)
        learner.step = factory(learner.step, log)  # type: ignore[arg-type]  # a Step, without cuda_graph
        return learner


def through_file(learner: Supervised, epoch: int) -> Mapping[str, Any]:
    """State of a learner after a detour through a checkpoint file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "last_model.tar"
        checkpoint.save({"epoch": epoch, "state_dict": learner.network.state_dict(), **learner.state_dict()}, path)
        return checkpoint.load(path).content


def train(case: Case, factory: Factory, *, resume: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """Train. Returns the tensors to compare, by name, and the lines that the step logged."""
    lines: list[str] = []
    learner, rows = case.learner(factory, lines.append), []
    for epoch in range(EPOCHS):
        if resume and epoch == RESUMED:
            learner = case.learner(factory, lines.append, through_file(learner, epoch))
        torch.manual_seed(seeds.derive_seed("dropout", epoch))
        rows.append(learner.epoch(epoch, str(case)))
    values = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    for module in learner.network, learner.method:
        values |= {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return values, lines


def difference(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """||a - b|| / ||b|| of each tensor; infinity for NaN."""
    def relative(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm().clamp(min=1e-12)).nan_to_num(torch.inf).item()
    return {name: relative(values[name].double(), expected[name].double()) for name in expected}


def judge(found: Mapping[str, float], noise: Mapping[str, float], tolerance: float) -> tuple[bool, str]:
    """Whether each difference is at most max(FACTOR * its noise, tolerance), and a description of the worst one."""
    allowed = {name: max(FACTOR * noise[name], tolerance) for name in found}
    worst = max(found, key=lambda name: found[name] / allowed[name])
    detail = f"difference {found[worst]:.1e} ({worst}), allowed {allowed[worst]:.1e}" if any(found.values()) else \
        "no difference"
    return found[worst] <= allowed[worst], detail


class Result(NamedTuple):
    """Outcome of a check."""

    check: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.check}: {self.detail}"


def compare(case: Case, tests: Mapping[str, tuple[Factory, float]], *, rounding: bool = False,
            fallback: bool = False) -> Iterable[Result]:
    """Compare steps with the step as written. tests: factory and tolerance by name. rounding: count the rounding of the
    case's dtype as noise too. fallback: whether the steps should fall back to the step as written."""
    expected, _ = train(case, eager)
    noise = difference(train(case, eager)[0], expected)
    if rounding:
        rounded = difference(train(case._replace(dtype=torch.float32), eager)[0], expected)
        noise = {name: max(noise[name], rounded[name]) for name in noise}
    for check, (factory, tolerance) in tests.items():
        values, lines = train(case, factory, resume=True)
        found = difference(values, expected)
        passed, detail = judge(found, noise, tolerance)
        yield Result(f"{check}, {case}", passed and bool(lines) == fallback, "; ".join([detail, *lines]))


def check_placement(case: Case, factory: Factory) -> Iterable[Result]:
    """Check that the images lie on the device as uint8, and that steps do not wait for it."""
    lines: list[str] = []
    learner = case.learner(factory, lines.append)
    images = learner.batches.part.images
    yield Result("images", images.dtype == torch.uint8 and images.device == case.device,
                 f"{str(images.dtype).removeprefix('torch.')} on {images.device}")
    for epoch in range(RESUMED):  # warm-up, and recordings
        learner.epoch(epoch, "")
    draws = learner.batches.draws(RESUMED, case.device)
    set_mode = torch.cuda.set_sync_debug_mode if case.device.type == "cuda" else lambda _: None
    set_mode("error")  # a wait raises RuntimeError
    try:
        for size, draw in zip(learner.batches.batch_sizes(), draws, strict=True):
            learner.step(draw, size)
    finally:
        set_mode("default")
    yield Result(f"no {factory.__name__} step waits for the device", not lines, "; ".join([str(case), *lines]))


def check_two_gpus() -> Iterable[Result]:
    """Train on one and on two GPUs with the stage itself."""
    losses = []
    params = {"dataset": "demo", "model_name": "preresnet20", "learning_rate": 0.01, "num_epochs": 1,
              "subset_size": 2048, "precision": "fp32"}
    for ids in (["0"], ["0", "1"]):
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "params.json").write_text(json.dumps(params))
            words = [sys.executable, "train_scratch.py", "--save_path", directory, "--gpu_id", *ids]
            done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
            if done.returncode:
                raise UserError((done.stderr.splitlines() or ["train_scratch.py failed"])[-1])
            losses.append(json.loads((Path(directory) / "results.json").read_text())["last"]["loss"])
    yield Result("two GPUs", abs(losses[1] / losses[0] - 1) <= 1e-2,
                 f"loss {losses[1]:.6g}, on one GPU {losses[0]:.6g}; allowed: 1 %, since summation orders differ")


def time_step(case: Case, factory: Factory) -> Iterable[Result]:
    """Print a row of the table: median of the epochs after 2 to warm up."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    lines: list[str] = []
    learner, rates = case.learner(factory, lines.append), []
    for epoch in range(EPOCHS):  # each ends with a wait for the device
        start = time.perf_counter()
        learner.epoch(epoch, "")
        rates.append(case.num_images / (time.perf_counter() - start))
    memory = torch.cuda.max_memory_reserved() / 2**20  # memory of graphs does not count as allocated
    print(f"{case.name:12} {factory.__name__:9} {statistics.median(rates[2:]):9.0f} images/s {memory:9.0f} MiB")
    if lines:
        yield Result(f"{factory.__name__}, {case}", False, "; ".join(lines))


def passes(name: str, check: Callable[[], Iterable[Result]]) -> bool:
    """Run a check and print its results; an exception is a failure. Returns whether all passed."""
    results = []
    try:
        for result in check():
            print(result, flush=True)
            results.append(result.passed)
    except Exception as error:  # a new device or library raises anything
        print(Result(name, False, f"{type(error).__name__}: {first_line(error)}"), flush=True)
        results.append(False)
    return all(results)


def families() -> list[str]:
    """The first network of each family of the zoo."""
    found: dict[str, str] = {}
    for name in MODEL_NAMES:
        build = REGISTRY[name].build
        found.setdefault(getattr(build, "func", build).__module__, name)
    return list(found.values())


def check_gpu() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, metavar="MODEL", default=families(),
                        help=f"networks to compare (default: {' '.join(families())})")
    models = parser.parse_args().models
    if not torch.cuda.is_available():
        raise UserError(f"scripts/check_gpu.py needs a GPU: no CUDA device is available (torch {torch.__version__})")
    device, start, passed = torch.device("cuda", torch.cuda.current_device()), time.perf_counter(), []
    native = choose_dtype("auto", device) == torch.bfloat16
    dtypes = (torch.float32, torch.bfloat16) if native else (torch.float32,)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
          + "\nskipped bfloat16: this GPU emulates it" * (not native), flush=True)
    torch.backends.cudnn.deterministic = True  # lowers the noise floor
    for dtype, name in itertools.product(dtypes, models):
        every = name == "net" and dtype == dtypes[-1]
        for method in dict.fromkeys([*METHODS, *attacks.REGISTRY, *defenses.REGISTRY] if every else METHODS):
            case = Case(name, method, dtype, device)
            passed.append(passes(str(case), partial(compare, case, {"recorded": (recorded, RECORDED_TOLERANCE)})))
        if name in COMPILED:
            case = Case(name, "kd", dtype, device, dropout_rate=0, optimizer="sgd")
            tests: dict[str, tuple[Factory, float]] = {"compiled": (compiled, COMPILED_TOLERANCE)}
            if dtype == dtypes[-1]:
                tests["compiled and recorded"] = compiled_and_recorded, COMPILED_TOLERANCE
            passed.append(passes(str(case), partial(compare, case, tests, rounding=True)))
    case = Case("net", "kd", torch.float32, device)  # with dropout, whose random generator a failed recording disturbs
    tests = {"cannot be recorded": (unrecordable, RECORDED_TOLERANCE)}
    passed.append(passes(str(case), partial(compare, case, tests, fallback=True)))
    for factory in KINDS[:2]:
        passed.append(passes("placement", partial(check_placement, Case(models[0], "kd", dtypes[-1], device), factory)))
    if torch.cuda.device_count() > 1:
        passed.append(passes("two GPUs", check_two_gpus))
    else:
        print("skipped two processes: one GPU")
    torch.backends.cudnn.deterministic = False
    print(f"\nTraining from labels, {str(dtypes[-1]).removeprefix('torch.')}, batches of 128 images; peak memory:")
    for name, factory in itertools.product(TIMED, KINDS):
        case = Case(name, "scratch", dtypes[-1], device, batch_size=128, num_images=20 * 128)
        passed.append(passes(f"{factory.__name__}, {case}", partial(time_step, case, factory)))
    print(f"\n{passed.count(False)} of {len(passed)} checks failed, {time.perf_counter() - start:.0f} s")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main(check_gpu)
