"""Images per second of each stage and network: this repository ("ours") and a conventional pipeline ("usual").

    python benchmarks/throughput.py                                    # on the GPU if there is one, else the CPU
    python benchmarks/throughput.py --precision fp32 --models net --batch_sizes 32 128 512
    python benchmarks/throughput.py --stages scratch nasty kd evaluate --models resnet18 --json gpu.json
    python benchmarks/throughput.py --models net --profile             # where the time goes, by operation

The usual pipeline: PIL images, torchvision transforms in a DataLoader with 4 workers, float32, contiguous NCHW, eager,
`.item()` in each step. Both sides use the same random images (32x32 pixels, `--steps` batches), network, loss and
optimizer. Each side is a process; they take turns at passes over the images, so the load of the machine affects both.

Columns:
    ours, usual    images per second, median of `--repeats` turns
    spread         lowest to highest
    ratio          median ratio of neighboring turns
    peak           our fraction of the rate of a large matrix product with the same dtype on this device, counting the
                   multiplications and additions of convolutions and linear layers, three forward passes for training
    memory         our peak memory, of the GPU or of the process, of which libraries take half a gigabyte

`kd_cached` is `kd` with a filled `teacher_cache`, as for a second student.
"""
from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.profiler import profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from model import MODEL_NAMES, build_model
from runs.stages import ScratchParams
from utils.data import Images, TrainBatches
from utils.device import choose_dtype, prepare_device
from utils.errors import first_line
from utils.evaluation import Frozen, evaluate
from utils.losses import cross_entropy, kd_terms, nasty_terms
from utils.session import describe
from utils.supervised import build_optimizer, build_step

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
STAGES = ("scratch", "nasty", "kd", "kd_cached", "evaluate")
COLUMNS = ("stage", "network", "batch", "images", "ours", "spread", "usual", "spread", "ratio", "peak", "memory")
Pass = Callable[[], None]


class PILImages(Dataset):
    """Data set like torchvision's CIFAR10: converts each item of an array to a PIL image and transforms it."""

    def __init__(self, pixels: np.ndarray, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[number])), self.labels[number]


class Case:
    """One row of the table: stage, networks, and images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.stage, self.name = options.stages[0], options.models[0]
        self.teacher = options.teacher if self.stage.startswith("kd") else self.name if self.stage == "nasty" else None
        self.batch_size, self.images = options.batch_sizes[0], options.steps[0] * options.batch_sizes[0]
        self.device, self.workers = torch.device(options.device), options.workers
        self.params = ScratchParams(dataset="demo", model_name=self.name, learning_rate=0.001, num_epochs=1,
                                    batch_size=self.batch_size, precision=options.precision,
                                    compile=options.compile, cuda_graph=options.cuda_graph)
        self.scratch = tempfile.TemporaryDirectory()
        random = np.random.default_rng(0)
        self.pixels = random.integers(0, 256, (self.images, 32, 32, 3), dtype=np.uint8)
        self.labels = random.integers(0, 10, self.images)

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self.params.precision, self.device)

    def build(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        return build_model(name, 10).to(self.device)

    def terms(self, network: nn.Module, frozen: Callable[..., torch.Tensor] | None, batch: object,
              images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if frozen is None:
            return {"loss": cross_entropy(network(images), labels)}
        if self.stage.startswith("kd"):
            return kd_terms(network(images), frozen(batch), labels, temperature=20, alpha=0.9)
        return nasty_terms(network(images), frozen(batch), labels, temperature=4, weight=0.004)

    @property
    def flops(self) -> int:
        """Floating-point operations per image."""
        forward = count_flops(build_model(self.name, 10))
        needed = forward if self.stage == "evaluate" else 3 * forward
        if self.teacher is None or self.stage == "kd_cached":  # the teacher does not run
            return needed
        return needed + count_flops(build_model(self.teacher, 10))


def ours(case: Case) -> Pass:
    """Build a pass over the images as in the stages of this repository."""
    prepare_device(case.device, case.params.precision)
    mean, std = (torch.tensor(values, device=case.device) for values in (MEAN, STD))
    pixels, labels = (torch.from_numpy(array).to(case.device) for array in (case.pixels, case.labels))
    part = Images(pixels, labels, mean, std)
    network = case.build(case.name).to(memory_format=torch.channels_last)
    frozen = Frozen(case.build(case.teacher).to(memory_format=torch.channels_last)) if case.teacher else None
    batches = TrainBatches(part, case.batch_size, "crop_flip", seed=0)
    step = build_step(network, lambda network, batch: case.terms(network, frozen, batch, batch.images, batch.labels),
                      [build_optimizer(case.params, network)], batches, case.params, case.dtype, print_error)
    caches = []
    if frozen and case.stage == "kd_cached":
        frozen.prepare("", 10, batches, case.dtype, Path(case.scratch.name), print_error)
        caches.append(frozen)

    def run_pass() -> None:
        if case.stage == "evaluate":
            evaluate(network, part, case.dtype)  # synchronizes the device
            return
        for cache in caches:
            cache.start_epoch(0)
        network.train()
        records = [step(draw, case.batch_size) for draw in batches.draws(0, case.device)]
        torch.stack(records).mean().item()

    return run_pass


def baseline(case: Case) -> Pass:
    """Build a pass over the images of a conventional pipeline."""
    from torchvision import transforms

    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores
    train = case.stage != "evaluate"
    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if train else []
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    loader = DataLoader(PILImages(case.pixels, case.labels.tolist(), transform), case.batch_size, shuffle=train,
                        num_workers=case.workers, persistent_workers=case.workers > 0,
                        pin_memory=torch.cuda.is_available())
    network = case.build(case.name).train(train)
    teacher = case.build(case.teacher).eval() if case.teacher else None
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001) if case.name in ("net", "mlp") else \
        torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)

    def answer(images: torch.Tensor) -> torch.Tensor:
        assert teacher is not None
        with torch.no_grad():
            return teacher(images)

    def run_pass() -> None:
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(case.device), labels.to(case.device)
            if not train:
                with torch.no_grad():
                    total += (network(images).argmax(1) == labels).float().mean().item()
                continue
            loss = case.terms(network, answer, images, images, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return run_pass


SIDES = {"ours": ours, "usual": baseline}


def run_side(case: Case, side: str) -> None:
    """Main loop of one side's process: for each line on stdin, run a turn and print its seconds."""
    run_pass = SIDES[side](case)
    run_pass()  # warm-up: memory, algorithms, graphs, compiled code
    run_pass()
    print("ready", flush=True)
    for _ in sys.stdin:
        synchronize(case.device)
        start = time.perf_counter()
        run_pass()
        synchronize(case.device)
        print(time.perf_counter() - start, flush=True)
    print(torch.cuda.max_memory_reserved() if case.device.type == "cuda" else peak_of_process())


def peak_of_process() -> int:
    """Peak memory of the process in bytes (Linux only)."""
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index("VmHWM:") + 1])


def measure(case: Case, repeats: int, call: list[str]) -> dict:
    """Measure one row of the table. call: command line of this script for the case."""
    sides: dict[str, subprocess.Popen] = {}

    def answer(side: str) -> str:
        output = sides[side].stdout
        line = output.readline() if output else ""
        return line or sys.exit(f"{side}: failed")

    for side in SIDES:  # one after the other: busy processes on shared cores slow each other down tenfold
        sides[side] = subprocess.Popen([*call, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True)
        answer(side)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats):
        for side in (sides, reversed(sides))[number % 2]:
            print(file=sides[side].stdin, flush=True)
            rates[side].append(case.images / float(answer(side)))
    memory = {}
    for side, process in sides.items():
        if process.stdin:
            process.stdin.close()
        memory[side] = int(answer(side))
        process.wait()
    return {"stage": case.stage, "network": f"{case.name} from {case.teacher}" if "kd" in case.stage else case.name,
            "batch_size": case.batch_size, "images": case.images, "precision": str(case.dtype).removeprefix("torch."),
            "images_per_second": rates, "memory_bytes": memory, "flops_per_image": case.flops,
            "share_of_peak": case.flops * statistics.median(rates["ours"]) / peak(case.device, case.dtype)}


def print_profile(case: Case) -> None:
    """Print the most expensive operations of a turn of each side."""
    for side, build in SIDES.items():
        run_pass = build(case)
        run_pass()
        run_pass()
        with profile() as record:
            run_pass()
        name = "self_device_time_total" if case.device.type == "cuda" else "self_cpu_time_total"
        times = {event.key: getattr(event, name) for event in record.key_averages()}
        print(f"\n{side}: {case.stage} {case.name}, {sum(times.values()) / 1e6:.2f} s")
        for key in sorted(times, key=lambda key: times[key], reverse=True)[:12]:
            print(f"{100 * times[key] / sum(times.values()):5.1f} %  {key}")


def print_error(text: str) -> None:
    print(text, file=sys.stderr)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_flops(network: nn.Module) -> int:
    """Floating-point operations of a forward pass on one image; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def cells(row: dict) -> list[str]:
    ours, baseline = row["images_per_second"]["ours"], row["images_per_second"]["usual"]
    ratio = statistics.median(a / b for a, b in zip(ours, baseline, strict=True))
    return [row["stage"], row["network"], str(row["batch_size"]), str(row["images"]), f"{statistics.median(ours):.0f}",
            f"{min(ours):.0f} to {max(ours):.0f}", f"{statistics.median(baseline):.0f}",
            f"{min(baseline):.0f} to {max(baseline):.0f}", f"{ratio:.2f}x", f"{100 * row['share_of_peak']:.0f} %",
            f"{row['memory_bytes']['ours'] / 2**20:.0f} MiB"]


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter: unwrapped description, and the default of each option."""


def positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise ValueError
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--stages", nargs="+", default=["scratch", "evaluate"], choices=STAGES,
                        help="stages to time")
    parser.add_argument("--models", nargs="+", default=["net", "preresnet20", "resnet18"],
                        choices=MODEL_NAMES, metavar="MODEL", help="networks of the zoo")
    parser.add_argument("--teacher", default="resnet18", choices=MODEL_NAMES, metavar="MODEL",
                        help="teacher of the stages kd and kd_cached")
    parser.add_argument("--batch_sizes", nargs="+", type=positive, default=[128], help="images per step")
    parser.add_argument("--steps", nargs="+", type=positive, default=[16], help="batches per pass over the images")
    parser.add_argument("--repeats", type=positive, default=5, help="timed passes of each side")
    parser.add_argument("--workers", type=int, default=4, help="DataLoader workers of the usual pipeline")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="precision of our side")
    parser.add_argument("--compile", action="store_true", help="use torch.compile on our side")
    parser.add_argument("--cuda_graph", action="store_true", help="record the steps of our side as CUDA graphs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="file for the measurements of all repeats")
    parser.add_argument("--profile", action="store_true", help="print the most expensive operations, and no table")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one of the processes of a row
    options = parser.parse_args()
    if min(options.batch_sizes) < 2:
        parser.error("--batch_sizes: must be at least 2, for batch statistics")
    if options.cuda_graph and torch.device(options.device).type != "cuda":
        parser.error("--cuda_graph needs a CUDA device")
    if options.profile and options.json:
        parser.error("--json has no effect with --profile: give one of them")
    try:
        torch.zeros(1, device=options.device)
        if options.json:
            open(options.json, "a").close()
    except (OSError, RuntimeError, AssertionError) as error:
        parser.error(first_line(error))
    return options


def main() -> None:
    options = parse()
    if options.side:
        run_side(Case(options), options.side)
        return
    device = torch.device(options.device)
    print(f"{machine(device)}, precision {options.precision}{', compiled' if options.compile else ''}"
          f"{', recorded' if options.cuda_graph else ''}\n")
    if not options.profile:
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    metadata = {"machine": machine(device), "call": sys.argv,
             "session": describe(device, choose_dtype(options.precision, device), {})}
    rows = []
    for stage, name, batch_size, steps in itertools.product(options.stages, options.models, options.batch_sizes,
                                                            options.steps):
        row = vars(options) | {"stages": [stage], "models": [name], "batch_sizes": [batch_size], "steps": [steps]}
        case = Case(argparse.Namespace(**row))
        if options.profile:
            print_profile(case)
            continue
        arguments = ["--stages", stage, "--models", name, "--batch_sizes", str(batch_size), "--steps", str(steps)]
        rows.append(measure(case, options.repeats, [sys.executable, *sys.argv, *arguments]))
        print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
        if options.json:
            options.json.write_text(json.dumps({**metadata, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
