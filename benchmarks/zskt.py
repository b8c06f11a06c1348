"""Seconds per pseudo-batch of ZSKT, with the teacher's outputs computed once, and with the published loop, which
computes images and teacher outputs again in each of the student's ten steps.

    python benchmarks/zskt.py
    python benchmarks/zskt.py --device cuda --batch_size 128 --repeats 20

wrn16_2 teaches wrn16_1, as in the paper. The two loops take turns. The table shows medians and spreads (lowest to
highest), and below it the median ratio of neighboring turns.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from datafree.distiller import DataSpec
from datafree.losses import attention_loss, kl_element_mean
from datafree.zskt import ZSKT, with_outputs
from model import build_model
from utils.device import choose_dtype, prepare_device
from utils.step import autocast


def build(options: argparse.Namespace) -> ZSKT:
    device = torch.device(options.device)
    params = ZSKT.Params(method="zskt", dataset="cifar10", model_name="wrn16_1", teacher_model="wrn16_2",
                        teacher_resume="", batch_size=options.batch_size)
    torch.manual_seed(0)
    student, teacher = (build_model(name, 10).to(device).to(memory_format=torch.channels_last)
                        for name in (params.model_name, params.teacher_model))
    spec = DataSpec(10, 32, torch.zeros(3, device=device), torch.ones(3, device=device), "crop_flip")
    return ZSKT(student.train(), teacher.eval().requires_grad_(False), spec, params,
                choose_dtype(options.precision, device))


def once(learner: ZSKT, latent: torch.Tensor) -> None:
    """Pseudo-batch of this repository."""
    learner.generator_step(latent)
    answers = learner.query_teacher(latent)
    for _ in range(learner._params.student_steps):
        learner.student_step(*answers, None)


def recompute_per_step(learner: ZSKT, latent: torch.Tensor) -> None:
    """Pseudo-batch of the published code, which also computes unused gradients of the generator."""
    learner.generator_step(latent)
    for _ in range(learner._params.student_steps):
        with autocast(learner._device, learner._dtype):
            images = learner._generator(latent)
            with torch.no_grad():
                logits, stages = with_outputs(learner._teacher, learner._teacher_stages, images)
            student_logits, student_stages = with_outputs(learner._student, learner._student_stages, images)
            loss = kl_element_mean(logits, student_logits, temperature=1) + 250 * attention_loss(student_stages, stages)
        learner._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner._student.parameters(), 5.0)
        learner._optimizer.step()
    learner._generator_optimizer.zero_grad()


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    prepare_device(torch.device(options.device), options.precision)
    learner = build(options)
    latent = torch.randn(options.batch_size, learner._params.latent_size, device=options.device)
    times: dict[str, list[float]] = {"once": [], "every step": []}
    for number in range(options.repeats + 1):
        for name, pseudo_batch in (("once", once), ("every step", recompute_per_step)):
            taken = seconds(partial(pseudo_batch, learner, latent))
            if number:  # without the warm-up
                times[name].append(taken)
    print("| teacher's outputs | seconds per pseudo-batch | spread |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |")
    ratio = statistics.median(b / a for a, b in zip(times["once"], times["every step"], strict=True))
    print(f"\nratio {ratio:.2f}x, batches of {options.batch_size}, {options.device}, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
