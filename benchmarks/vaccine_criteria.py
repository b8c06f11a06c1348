"""Criteria that may tell a good shuffle of ABD's vaccine from a bad one without data, labels or the trigger.

    OMP_NUM_THREADS=1 python benchmarks/vaccine_criteria.py experiments/demo/triggers/*/teacher --out criteria.csv

For several shuffles of each poisoned teacher, it computes criteria on patches of a drawn picture, and what they should
predict: `auc`, the area under the ROC curve with which a small divergence k of teacher and shuffled copies detects
triggered test images. The table has, for each criterion, the mean and the lowest `auc` of the shuffles that it chooses,
one per teacher, and its mean rank correlation (Spearman) with `auc` over the shuffles of a teacher. Criteria, of which
the largest value is chosen:

    tail               tail ratio of log k (`datafree.vaccine.tail_ratio`), which the published test compares with 2 %
    disagreement       fraction of patches with different predictions of teacher and T~
    class_entropy      entropy of the classes that T~ predicts, in nats
    divergence         mean of k
    spread             standard deviation of log10 k
    member_agreement   fraction of patches for which all shuffled copies predict the same class
    planted            `auc` for a trigger of our own, planted in a copy of the teacher that is shuffled equally
"""
from __future__ import annotations

import argparse
import copy
import csv
import itertools
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
Shuffle = dict[str, float]  # criteria and `auc` of a shuffle


@torch.inference_mode()
def logits(network: nn.Module | ShuffledTeacher, part: Images) -> Tensor:
    return torch.cat([network(images) for images, _ in in_order(part)])


class Victim:
    """A poisoned teacher, clean and triggered test images, and patches on which the criteria are computed."""

    def __init__(self, directory: Path, data_dir: Path) -> None:
        """directory: run of train_poisoned.py, whose last epoch is read."""
        content = checkpoint.load(directory / "last_model.tar", "teacher").content
        params = content["params"]
        self.seed = params["seed"]
        dataset = load_dataset(params["dataset"], data_dir, training=False)
        self.num_classes, self.image_size = dataset.num_classes, dataset.image_size
        network = build_model(params["model_name"], dataset.num_classes, num_channels=params["num_channels"])
        network.load_state_dict(content["state_dict"])
        self.teacher = network.eval().requires_grad_(False)
        mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
        others = (dataset.test_labels != params["target"]).nonzero()[:TEST_IMAGES, 0]
        self.clean = Images(dataset.test_images[others], dataset.test_labels[others], mean, std)
        stamp = build_trigger(params["trigger"], params["dataset"]).stamp
        self.triggered = replace(self.clean, images=stamp(self.clean.images))
        pixels = patches(draw_picture(self.seed), 3 * PATCHES, self.image_size, self.seed, ("colour", "grey", "blob"))
        part = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), mean, std)
        chosen = balance(logits(self.teacher, part).argmax(1), PATCHES, self.num_classes, seed=self.seed)
        self.patches = replace(part, images=pixels[chosen], labels=part.labels[chosen])

    def plant(self) -> tuple[nn.Module, Images]:
        """Plant a random pattern in a copy of the teacher, which keeps its outputs for other patches. Returns the copy,
        and the patches with the pattern."""
        random, part = seeds.generator(self.seed, "planted trigger"), self.patches
        pattern = torch.randint(0, 2, (PLANTED_SIZE, PLANTED_SIZE, 3), generator=random, dtype=torch.uint8) * 255
        top, left = torch.randint(0, self.image_size - PLANTED_SIZE + 1, (2,), generator=random).tolist()
        target = int(torch.randint(0, self.num_classes, (), generator=random))
        stamped = replace(part, images=part.images.clone())
        stamped.images[:, top:top + PLANTED_SIZE, left:left + PLANTED_SIZE] = pattern
        clean_images, stamped_images = (torch.cat([images for images, _ in in_order(each)]) for each in (part, stamped))
        planted = copy.deepcopy(self.teacher).train().requires_grad_(True)
        optimizer = torch.optim.Adam(planted.parameters(), lr=1e-3)
        for _ in range(PLANTED_STEPS):
            index = torch.randint(0, len(part), (BATCH,), generator=random)
            few = index[:int(PLANTED_FRACTION * BATCH)]
            loss = kl_divergence(self.teacher(clean_images[index]), planted(clean_images[index]), temperature=1) \
                + F.cross_entropy(planted(stamped_images[few]), torch.full((len(few),), target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return planted.eval().requires_grad_(False), stamped

    def shuffles(self, count: int, layers: int) -> Iterator[Shuffle]:
        """Criteria and `auc` of each shuffle."""
        planted, stamped = self.plant()
        pairs = [(network, ShuffledTeacher(network, layers=layers, seed=self.seed, image_size=self.image_size))
                 for network in (self.teacher, planted)]
        for _ in range(count):
            detected = [auc(-k(*pair, positive), -k(*pair, negative)) for pair, positive, negative in
                        zip(pairs, (self.triggered, stamped), (self.clean, self.patches), strict=True)]
            yield {"auc": detected[0], **self._on_patches(pairs[0][1]), "planted": detected[1]}
            for _, shuffled in pairs:
                shuffled.shuffle()

    def _on_patches(self, shuffled: ShuffledTeacher) -> Shuffle:
        expected = logits(self.teacher, self.patches)
        members = torch.stack([logits(member, self.patches) for member in shuffled.members])
        mixed, votes = members.mean(0), members.argmax(2)
        values, predicted = divergence(expected, mixed), mixed.argmax(1)
        return {"tail": tail_ratio(values),
                "disagreement": (predicted != expected.argmax(1)).float().mean().item(),
                "class_entropy": torch.distributions.Categorical(predicted.bincount().float()).entropy().item(),
                "divergence": values.mean().item(),
                "spread": values.double().clamp(min=SMALLEST).log10().std().item(),
                "member_agreement": (votes == votes[0]).all(0).float().mean().item()}


def k(teacher: nn.Module, shuffled: ShuffledTeacher, part: Images) -> Tensor:
    """Divergence of each image, (N,)."""
    return divergence(logits(teacher, part), logits(shuffled, part))


def table(teachers: Sequence[Sequence[Shuffle]]) -> list[list[str]]:
    """Table of the criteria, and of the first, an average, and the best shuffle. teachers: the shuffles of each."""
    aucs = [[shuffle["auc"] for shuffle in shuffles] for shuffles in teachers]
    lines = [["chosen by", "mean auc", "lowest auc", "rank correlation"]]
    for name, chosen in (("the first", [own[0] for own in aucs]), ("an average one", [fmean(own) for own in aucs]),
                         ("the best", [max(own) for own in aucs])):
        lines.append([name, f"{fmean(chosen):.3f}", f"{min(chosen):.3f}", ""])
    for name in CRITERIA:
        scores = [[shuffle[name] for shuffle in shuffles] for shuffles in teachers]
        chosen = [own[max(range(len(own)), key=score.__getitem__)] for own, score in zip(aucs, scores, strict=True)]
        ranks = [float(spearmanr(score, own).statistic) for own, score in zip(aucs, scores, strict=True)
                 if len(set(score)) > 1]
        lines.append([name, f"{fmean(chosen):.3f}", f"{min(chosen):.3f}", f"{fmean(ranks):+.2f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", type=Path, metavar="DIR", help="runs of train_poisoned.py")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--shuffles", type=int, default=8, metavar="N", help="shuffles per teacher (default: 8)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="shuffled convolutions (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all values as CSV")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="make the table of such files")
    arguments = parser.parse_args()
    if not (arguments.teachers or arguments.read):
        parser.error("give runs of train_poisoned.py, or --read FILE")
    rows: list[dict[str, str | float]] = []
    for file in arguments.read or ():
        with open(file, newline="") as lines:
            rows += csv.DictReader(lines)
    for directory in arguments.teachers:
        found = list(Victim(directory, arguments.data_dir).shuffles(arguments.shuffles, arguments.layers))
        rows += [{"teacher": str(directory), "shuffle": number, **shuffle} for number, shuffle in enumerate(found)]
        print(directory, "auc", *(f"{shuffle['auc']:.2f}" for shuffle in found), flush=True)
    if arguments.out:
        with open(arguments.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    teachers = [[{name: float(row[name]) for name in ("auc", *CRITERIA)} for row in group]
                for _, group in itertools.groupby(rows, lambda row: row["teacher"])]
    print(markdown(table(teachers)))


if __name__ == "__main__":
    main()
