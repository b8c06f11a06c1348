"""Images per second of each stage and network: this repository against the pipeline that such code usually has.

    python benchmarks/throughput.py                                    # on the CPU or GPU that is there
    python benchmarks/throughput.py --precision fp32 --models net --batch_sizes 32 128 512
    python benchmarks/throughput.py --stages scratch nasty kd evaluate --models resnet18 --json gpu.json

The usual pipeline: PIL images through torchvision transforms in a DataLoader with 4 workers, float32, contiguous NCHW,
eager, `.item()` each step. Both train on the same images (random, 32x32), with the same network, loss and optimiser, in
turns within one process for each row, so that what else the machine does hits both. A repeat is one epoch of `--steps`
batches; given are the median and the spread (lowest and highest) of the repeats. Peak: the largest rate of a large
matrix product here, in the arithmetic that is used; the share of it counts the multiplications and additions of
convolutions and linear layers, three times the forward pass for a network in training.
"""
from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from model import build_model
from utils.data import Images, TrainBatches
from utils.losses import cross_entropy, kd_terms, nasty_terms
from utils.params import ScratchParams
from utils.training import Frozen, build_optimizer, build_step, choose_dtype, evaluate

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
COLUMNS = ("stage", "network", "batch", "ours", "spread", "usual", "spread", "ratio", "peak", "memory")


class PILImages(Dataset):
    """As torchvision's CIFAR10: an array, of which each item becomes a PIL image and is transformed."""

    def __init__(self, pixels: np.ndarray, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[number])), self.labels[number]


def stage_terms(stage: str, network: nn.Module, frozen: Callable, batch: object, images: torch.Tensor,
                labels: torch.Tensor) -> dict[str, torch.Tensor]:
    if stage == "kd":
        return kd_terms(network(images), frozen(batch), labels, temperature=20, alpha=0.9)
    if stage == "nasty":
        return nasty_terms(network(images), frozen(batch), labels, temperature=4, weight=0.004)
    return {"loss": cross_entropy(network(images), labels)}


def measure(stage: str, name: str, batch_size: int, options: argparse.Namespace, device: torch.device) -> dict:
    """One row of the table."""
    params = ScratchParams(dataset="demo", model_name=name, learning_rate=0.001, num_epochs=1, batch_size=batch_size,
                           precision=options.precision, compile=options.compile)
    dtype = choose_dtype(params.precision, device)
    random = np.random.default_rng(0)
    count = options.steps * batch_size
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, count)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    part = Images(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), mean, std)
    teacher = options.teacher if stage == "kd" else name

    def build(which: str, fast: bool) -> nn.Module:
        torch.manual_seed(0)
        network = build_model(which, 10).to(device)
        return network.to(memory_format=torch.channels_last) if fast else network

    network, frozen = build(name, True), Frozen(build(teacher, True))
    optimizer = build_optimizer(params, network)
    batches = TrainBatches(part, batch_size, "crop_flip", seed=0)
    step = build_step(network, lambda network, batch: stage_terms(stage, network, frozen, batch, batch.images,
                                                                  batch.labels),
                      optimizer, batches, params, dtype, lambda text: print(text, file=sys.stderr))
    epochs = iter(range(10**6))

    def ours() -> None:
        if stage == "evaluate":
            evaluate(network, part, dtype)
            return
        network.train()
        records = [step(draw, batch_size) for draw in batches.draws(next(epochs), device)]
        torch.stack(records).mean().item()

    plain, plain_frozen = build(name, False), build(teacher, False).eval()
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.001) if name in ("net", "mlp") else \
        torch.optim.SGD(plain.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    loader = usual_loader(pixels, labels.tolist(), batch_size, options.workers, train=stage != "evaluate")

    def answer(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return plain_frozen(images)

    def usual() -> None:
        correct = 0
        plain.train(stage != "evaluate")
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            if stage == "evaluate":
                with torch.no_grad():
                    correct += (plain(images).argmax(1) == targets).float().mean().item()
                continue
            loss = stage_terms(stage, plain, answer, images, images, targets)["loss"]
            plain_optimizer.zero_grad()
            loss.backward()
            plain_optimizer.step()
            correct += loss.item()

    ours()  # warm-up: memory, algorithms, graphs, compiled code
    ours()
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usual()
    rates: dict[str, list[float]] = {"ours": [], "usual": []}
    for _ in range(options.repeats):
        for which, run in (("ours", ours), ("usual", usual)):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            rates[which].append(count / (time.perf_counter() - start))
    forward = flops(build_model(name, 10))
    needed = forward if stage == "evaluate" else 3 * forward
    needed += flops(build_model(teacher, 10)) if stage in ("kd", "nasty") else 0
    return {"stage": stage, "network": f"{name} from {teacher}" if stage == "kd" else name, "batch_size": batch_size,
            "precision": str(dtype).removeprefix("torch."), "images_per_second": rates, "memory_bytes": memory,
            "flops_per_image": needed, "share_of_peak": needed * statistics.median(rates["ours"]) / peak(device, dtype)}


def usual_loader(pixels: np.ndarray, labels: list[int], batch_size: int, workers: int, *, train: bool) -> DataLoader:
    from torchvision import transforms

    augmentation = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if train else []
    transform = transforms.Compose([*augmentation, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return DataLoader(PILImages(pixels, labels, transform), batch_size, shuffle=train, num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops(network: nn.Module) -> int:
    """Floating-point operations of a forward pass over one image, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def cells(row: dict) -> list[str]:
    ours, usual = row["images_per_second"]["ours"], row["images_per_second"]["usual"]
    ratio = statistics.median(a / b for a, b in zip(ours, usual, strict=True))
    return [row["stage"], row["network"], str(row["batch_size"]), f"{statistics.median(ours):.0f}",
            f"{min(ours):.0f} to {max(ours):.0f}", f"{statistics.median(usual):.0f}",
            f"{min(usual):.0f} to {max(usual):.0f}", f"{ratio:.2f}x", f"{100 * row['share_of_peak']:.0f} %",
            f"{row['memory_bytes'] / 2**20:.0f} MiB"]


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["scratch", "evaluate"],
                        choices=["scratch", "nasty", "kd", "evaluate"])
    parser.add_argument("--models", nargs="+", default=["net", "preresnet20", "resnet18"])
    parser.add_argument("--teacher", default="resnet18", help="of the stage kd")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--steps", type=int, default=16, help="batches of a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="of the usual pipeline's DataLoader")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile for ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there, every repeat of them")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # one row, as JSON
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.row:
        print(json.dumps(measure(options.stages[0], options.models[0], options.batch_sizes[0], options, device)))
        return
    print(f"{machine(device)}, precision {options.precision}{', compiled' if options.compile else ''}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for stage in options.stages:
        for name in options.models:
            for size in options.batch_sizes:  # each in a process of its own: its peak of memory is its own
                cell = ["--row", "--stages", stage, "--models", name, "--batch_sizes", str(size)]
                done = subprocess.run([sys.executable, *sys.argv, *cell], check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout))
                print("| " + " | ".join(cells(rows[-1])) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
