"""Criteria that need no data, labels or trigger, and may tell a good shuffle of ABD's vaccine from a bad one.

    OMP_NUM_THREADS=1 python benchmarks/vaccine_criteria.py experiments/demo/triggers/*/teacher --out criteria.csv

For each shuffle of each poisoned teacher, it computes the criteria on patches of a drawn picture, and what they should
predict: the `auc` with which a small divergence k of teacher and shuffled copies detects triggered test images. The
table has Spearman's rank correlation of each criterion with `auc` over the shuffles of a teacher, and the mean `auc` of
the shuffle that each criterion chooses; mean over the teachers of a trigger. It compares with the first shuffle, the
mean, and the best of all. Criteria (higher is better):

    tail               tail ratio of log k, the published criterion (`datafree.vaccine.tail_ratio`)
    disagreement       fraction of patches with different predictions of teacher and T~
    class_entropy      entropy of the classes that T~ predicts, in nats
    divergence         mean of k
    spread             standard deviation of log10 k
    member_agreement   fraction of patches with the same prediction of all shuffled copies
    planted            `auc` for a trigger of our own, planted in a copy of the teacher that is shuffled equally
"""
from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backdoor.triggers import build_trigger
from datafree.diagnosis import auc
from datafree.patches import balance, draw_picture, patches
from datafree.vaccine import SMALLEST, ShuffledTeacher, divergence, tail_ratio
from model import build_model
from reports.table import markdown
from utils import checkpoint, seeds
from utils.data import Images, in_order
from utils.datasets import load_dataset
from utils.losses import kl_divergence

CRITERIA = ("tail", "disagreement", "class_entropy", "divergence", "spread", "member_agreement", "planted")
PATCHES, TEST_IMAGES, BATCH = 2000, 1000, 128
PLANTED_STEPS, PLANTED_FRACTION, PLANTED_SIZE = 150, 0.1, 4


def load_teacher(directory: Path) -> tuple[nn.Module, dict]:
    """The last epoch of a run of train_poisoned.py, frozen, and the run's parameters."""
    content = checkpoint.load(directory / "last_model.tar", "teacher").content
    params = content["params"]
    network = build_model(params["model_name"], len(content["data"]["classes"]), num_channels=params["num_channels"])
    network.load_state_dict(content["state_dict"])
    return network.eval().requires_grad_(False), params


@torch.inference_mode()
def logits(network: nn.Module | ShuffledTeacher, part: Images) -> Tensor:
    return torch.cat([network(images) for images, _ in in_order(part)])


def plant(teacher: nn.Module, part: Images, num_classes: int, seed: int) -> tuple[nn.Module, Images]:
    """Plant a random patch of PLANTED_SIZE pixels in a copy of the teacher, which keeps its outputs for other images.

    part: the patches. Returns the copy and the patches with the trigger.
    """
    random = seeds.generator(seed, "planted trigger")
    size, edge = PLANTED_SIZE, part.images.shape[1] - PLANTED_SIZE
    pattern = torch.randint(0, 2, (size, size, 3), generator=random, dtype=torch.uint8) * 255
    top, left = torch.randint(0, edge + 1, (2,), generator=random).tolist()
    stamped = part.images.clone()
    stamped[:, top:top + size, left:left + size] = pattern
    triggered = replace(part, images=stamped)
    target = int(torch.randint(0, num_classes, (), generator=random))
    copied = copy.deepcopy(teacher).train().requires_grad_(True)
    optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3)
    clean_images, stamped_images = (torch.cat([images for images, _ in in_order(each)]) for each in (part, triggered))
    for _ in range(PLANTED_STEPS):
        index = torch.randint(0, len(part), (BATCH,), generator=random)
        few = index[:int(PLANTED_FRACTION * BATCH)]
        loss = kl_divergence(teacher(clean_images[index]), copied(clean_images[index]), temperature=1)
        output = copied(stamped_images[few])
        loss = loss + F.cross_entropy(output, torch.full((len(few),), target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copied.eval().requires_grad_(False), triggered


def measure(directory: Path, data_dir: Path, shuffles: int, layers: int) -> Iterator[dict[str, float | str]]:
    """Criteria and `auc` of each shuffle of a teacher."""
    teacher, params = load_teacher(directory)
    dataset, seed = load_dataset(params["dataset"], data_dir, training=False), params["seed"]
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    test = Images(dataset.test_images, dataset.test_labels, mean, std)
    others = (test.labels != params["target"]).nonzero()[:TEST_IMAGES, 0]
    clean = replace(test, images=test.images[others], labels=test.labels[others])
    triggered = replace(clean, images=build_trigger(params["trigger"], params["dataset"]).stamp(clean.images))
    pixels = patches(draw_picture(seed), 3 * PATCHES, dataset.image_size, seed, ("colour", "grey", "blob"))
    part = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), mean, std)
    chosen = balance(logits(teacher, part).argmax(1), PATCHES, dataset.num_classes, seed=seed)
    part = replace(part, images=pixels[chosen], labels=part.labels[chosen])
    planted, planted_patches = plant(teacher, part, dataset.num_classes, seed)
    shuffled = ShuffledTeacher(teacher, layers=layers, seed=seed, image_size=dataset.image_size)
    shuffled_planted = ShuffledTeacher(planted, layers=layers, seed=seed, image_size=dataset.image_size)
    outputs = {name: logits(teacher, images) for name, images in
               (("clean", clean), ("triggered", triggered), ("patches", part))}
    planted_outputs = [logits(planted, images) for images in (part, planted_patches)]
    for number in range(shuffles):
        k = {name: divergence(outputs[name], logits(shuffled, images)) for name, images in
             (("clean", clean), ("triggered", triggered))}
        members = torch.stack([logits(member, part) for member in shuffled.members])
        mixed = members.mean(0)
        on_patches = divergence(outputs["patches"], mixed)
        predicted = mixed.argmax(1)
        frequency = predicted.bincount(minlength=mixed.shape[1]) / len(predicted)
        k_clean, k_stamped = (divergence(output, logits(shuffled_planted, images)) for output, images in
                              zip(planted_outputs, (part, planted_patches), strict=True))
        votes = members.argmax(2)
        yield {"teacher": str(directory), "trigger": params["trigger"], "shuffle": number,
               "auc": auc(-k["triggered"], -k["clean"]),
               "tail": tail_ratio(on_patches),
               "disagreement": (predicted != outputs["patches"].argmax(1)).float().mean().item(),
               "class_entropy": -(frequency * frequency.clamp(min=1e-12).log()).sum().item(),
               "divergence": on_patches.mean().item(),
               "spread": on_patches.double().clamp(min=SMALLEST).log10().std().item(),
               "member_agreement": (votes == votes[0]).all(0).float().mean().item(),
               "planted": auc(-k_stamped, -k_clean)}
        for each in (shuffled, shuffled_planted):
            each.shuffle()


def table(rows: Sequence[dict[str, float | str]]) -> list[list[str]]:
    """Rank correlation of each criterion with `auc`, and the mean `auc` of its choice, by trigger."""
    teachers: dict[str, list[dict[str, float | str]]] = {}
    for row in rows:
        teachers.setdefault(str(row["teacher"]), []).append(row)
    triggers = sorted({str(row["trigger"]) for row in rows})
    lines = [["trigger", "first", "mean", "best", *CRITERIA]]
    cells: dict[str, list[list[float]]] = {}
    for own in teachers.values():
        aucs = [float(row["auc"]) for row in own]
        values = [aucs[0], fmean(aucs), max(aucs)]
        for name in CRITERIA:
            criterion = [float(row[name]) for row in own]
            best = max(range(len(own)), key=criterion.__getitem__)
            constant = len(set(criterion)) == 1 or len(set(aucs)) == 1
            values += [aucs[best], 0.0 if constant else float(spearmanr(criterion, aucs).statistic)]
        cells.setdefault(str(own[0]["trigger"]), []).append(values)
    for trigger in [*triggers, "all"]:
        found = [values for name, group in cells.items() if trigger in (name, "all") for values in group]
        means = [fmean(column) for column in zip(*found, strict=True)]
        pairs = [f"{choice:.3f} ({rank:+.2f})" for choice, rank in zip(means[3::2], means[4::2], strict=True)]
        lines.append([trigger, *(f"{value:.3f}" for value in means[:3]), *pairs])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", type=Path, metavar="DIR", help="runs of train_poisoned.py")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--shuffles", type=int, default=8, metavar="N", help="shuffles per teacher (default: 8)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="shuffled convolutions (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all values as CSV")
    arguments = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    for directory in arguments.teachers:
        rows += measure(directory, arguments.data_dir, arguments.shuffles, arguments.layers)
        print(directory, "auc", *(f"{row['auc']:.2f}" for row in rows[-arguments.shuffles:]), flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(table(rows)))


if __name__ == "__main__":
    main()
