"""Evaluate checkpoints without training: accuracy, calibration, profile of the answers, agreement, backdoor.

    python evaluate.py experiments/demo/baseline/net16 experiments/demo/kd_nasty_net16/nasty_net16
    python evaluate.py experiments/mine/best_model.tar --against experiments/demo/baseline/net16
    python evaluate.py weights.safetensors --model torchvision:resnet18 --dataset folder:images --image_size 64
    python evaluate.py experiments/mine --answer_defense mad:0.5 --foreign cifar100
    python evaluate.py experiments/demo/abd/teacher --trigger badnet_sq --target 0 --json teacher.json

Price, for clients: accuracy, expected calibration error (ECE, 15 bins) and area under the risk-coverage curve (AURC),
in percent; cross-entropy, in nats. With `--foreign`: AUROC of separating test images from foreign images by confidence,
in percent. With `--trigger`: attack success rate (ASR), base rate and target recall, in percent.

Profile, for a student: entropy, and conditional mutual information of image and answer given the class (CMI), in nats;
separation of the classes (mean KL between their mean answers), in nats; non-target mass (probability of all classes
except the label), in percent; peaks (number of classes with at least a tenth of the largest probability). With
`--against`: agreement (same top class), in percent; KL(reference || network), in nats; L1 distance of the
probabilities; rank correlation of the classes below the top class.

`--interface` and `--answer_defense` evaluate the answers that a client gets instead of the network's own outputs, and
add their L1 distance from these (L1 change). Probabilities of exactly 0 count as 1e-6.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backdoor.metrics import BackdoorTest
from backdoor.triggers import build_trigger
from defenses.answers import build_answers
from reports.table import markdown
from runs.trained import Source, read_source
from utils import cli, seeds
from utils.data import Images
from utils.data_record import compare_origin, describe_input
from utils.datasets import Dataset, load_dataset, with_transfer_set
from utils.device import choose_device, choose_dtype, prepare_device
from utils.errors import UserError
from utils.evaluation import Frozen, confusion_matrix
from utils.files import write_text
from utils.image_folder import Decoding
from utils.quality import agreement, change, compute_answers, foreign_auroc, profile, quality, similarity
from utils.results import Row

FOR_USERS = {"accuracy": "accuracy", "cross_entropy": "cross-entropy", "calibration_error": "ECE",
             "risk_coverage_area": "AURC", "foreign_auroc": "foreign AUROC", "defense_l1_change": "L1 change",
             "asr": "ASR", "triggered_accuracy": "triggered accuracy", "base_rate": "base rate",
             "target_recall": "target recall"}
FOR_STUDENTS = {"entropy": "entropy", "cmi": "CMI", "separation": "separation", "non_target_mass": "non-target mass",
                "peaks": "peaks", "agreement": "agreement", "kl": "KL", "l1_change": "L1 distance",
                "rank_correlation": "rank correlation"}
GIVEN = {"model": "model_name", "num_channels": "num_channels", "model_options": "model_options",
         "dataset": "dataset", "image_size": "image_size", "background": "background",
         "interpolation": "interpolation", "mean": "mean", "std": "std"}


def evaluate() -> None:
    arguments = _parser().parse_args()
    given = {key: value for option, key in GIVEN.items() if (value := getattr(arguments, option)) is not None}
    file = "best_model.tar" if arguments.best else "last_model.tar"
    sources = [read_source(name, file, given) for name in arguments.checkpoints]
    reference = read_source(arguments.against, file, given, sources[0]) if arguments.against else None
    test = Test(arguments, [*sources, *([reference] if reference else [])])
    compared = test.answers(reference) if reference else None
    rows = {source.name: test.evaluate(source, compared) for source in sources}
    images = len(test.dataset(sources[0]).test_labels)
    sizes = sorted({test.dataset(source).image_size for source in sources})
    print(f"{test.name}: {images} test images of {' and '.join(f'{size}x{size}' for size in sizes)} pixels")
    for warning in test.warnings:
        print(f"remark: {warning}")
    print(f"{markdown(_table(rows, FOR_USERS))}\n\n{markdown(_table(rows, FOR_STUDENTS))}")
    if arguments.json:
        content = {
            "dataset": test.name, "images": images, "interface": arguments.interface,
            "answer_defense": arguments.answer_defense, "trigger": arguments.trigger,
            "target": arguments.target if arguments.trigger else None,
            "against": reference.checkpoint.source if reference else None,
            "checkpoints": {source.name: {**source.checkpoint.source, **rows[source.name]} for source in sources}}
        write_text(arguments.json, json.dumps(content, indent=1) + "\n")


class Test:
    """Test images of one data set, preprocessed for each network, and metrics of networks on them."""

    def __init__(self, arguments: argparse.Namespace, sources: Sequence[Source]) -> None:
        """Raises UserError if the sources have several data sets, or one does not fit its data set."""
        names = list(dict.fromkeys(source.params.dataset for source in sources))
        if len(names) > 1:
            raise UserError(f"the checkpoints are of several data sets, {' and '.join(names)}: choose one with "
                            "--dataset")
        self.name, self.data_dir = names[0], arguments.data_dir
        self.device = choose_device(arguments.device, None, cuda=True)
        prepare_device(self.device, "fp32")
        self.dtype = choose_dtype("fp32", self.device)
        self.protection = build_answers(arguments, in_order=True)
        self.foreign = arguments.foreign
        if arguments.trigger and self.protection and self.protection.ordered:
            raise UserError("--trigger needs answers that do not depend on the order of queries, unlike "
                            f"{arguments.answer_defense}")
        self.trigger = build_trigger(arguments.trigger, self.name) if arguments.trigger else None
        self.target = arguments.target
        self._datasets: dict[Decoding, Dataset] = {}
        self._foreign_images: dict[Decoding, torch.Tensor] = {}
        self.warnings: list[str] = []
        self._networks = {source.name: self._load(source) for source in sources}

    def answers(self, source: Source) -> torch.Tensor:
        """Answers (N, C) for the test images, as log-probabilities."""
        return self._protected(self._logits(source))

    def _logits(self, source: Source) -> torch.Tensor:
        frozen, part = self._networks[source.name]
        return compute_answers(frozen.network, part, self.dtype)

    def _protected(self, logits: torch.Tensor) -> torch.Tensor:
        return self.protection(logits) if self.protection else logits

    def evaluate(self, source: Source, compared: torch.Tensor | None) -> Row:
        """All metrics of a network. compared: reference answers (N, C). Raises UserError if outputs are not finite."""
        frozen, part = self._networks[source.name]
        logits = self._logits(source)
        if not logits.isfinite().all():
            raise UserError(f"{source.name}: the outputs of the network are not finite")
        answers, labels = self._protected(logits), part.labels.cpu()
        row = quality(answers, labels) | profile(answers, labels)
        if self.protection and self.protection.changes:
            row["defense_l1_change"] = change(answers, logits)
        if self.foreign:
            foreign = dataclasses.replace(part, **self._foreign(source, part))
            row["foreign_auroc"] = foreign_auroc(answers, self._protected(compute_answers(frozen.network, foreign,
                                                                                    self.dtype)))
        if compared is not None:
            row |= agreement(answers, compared) | similarity(answers, compared)
        if self.trigger:
            test = BackdoorTest(part, self.trigger, self.target, self.dtype)
            self._warn(*test.left_out)
            row |= test(frozen.with_interface, confusion_matrix(frozen.with_interface, part, self.dtype)[0])
        return row

    def _foreign(self, source: Source, part: Images) -> dict[str, torch.Tensor]:
        """Foreign images of the size of the test images, at most as many, the same for all networks."""
        key = Decoding.of(source.params)
        if key not in self._foreign_images:
            found = with_transfer_set(self.dataset(source), self.foreign, self.data_dir, key).train_images
            drawn = torch.randperm(len(found), generator=seeds.generator("foreign"))[:len(part)]
            self._foreign_images[key] = found[drawn].to(self.device)
        found = self._foreign_images[key]
        return {"images": found, "labels": torch.zeros(len(found), dtype=torch.int64, device=self.device)}

    def dataset(self, source: Source) -> Dataset:
        """Data set of a source; images of folders are resized and filled as in the training of its network."""
        key = Decoding.of(source.params)
        if key not in self._datasets:
            found = load_dataset(self.name, self.data_dir, key, training=False)
            self._datasets[key] = dataclasses.replace(found, test_images=found.test_images.to(self.device),
                                                      test_labels=found.test_labels.to(self.device))
        return self._datasets[key]

    def _load(self, source: Source) -> tuple[Frozen, Images]:
        """Network of a source, and the test images with its mean and std."""
        dataset, params = self.dataset(source), source.params
        if self.trigger and not 0 <= self.target < dataset.num_classes:
            raise UserError(f"--target {self.target}: {self.name} has {dataset.num_classes} classes, from 0 on")
        mean, std = (torch.tensor(values, device=self.device) for values in (params.mean or dataset.mean,
                                                                             params.std or dataset.std))
        part = Images(dataset.test_images, dataset.test_labels, mean, std)
        self._warn(*dataset.warnings, *compare_origin(source.checkpoint, describe_input(dataset, part), source.name))
        network = source.build(dataset.num_classes, dataset.image_size)
        if network.imported_code:
            self._warn(f"{source.name}: {params.model_name} was imported from {network.imported_code}")
        network.to(self.device).to(memory_format=torch.channels_last)
        return Frozen(network, self.protection), part

    def _warn(self, *texts: str) -> None:
        self.warnings += [text for text in texts if text not in self.warnings]


def _table(rows: dict[str, Row], heads: dict[str, str]) -> list[list[str]]:
    keys = [key for key in heads if any(key in row for row in rows.values())]
    three_digits = ("cross_entropy", "entropy", "kl", "cmi", "separation", "defense_l1_change", "l1_change",
                    "rank_correlation")
    return [["checkpoint", *(heads[key] for key in keys)],
            *([name, *(f"{row[key]:.{3 if key in three_digits else 2}f}" if key in row else "" for key in keys)]
              for name, row in rows.items())]


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"dropout": 0.1}}')
    return options


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="run directory or checkpoint file")
    add("--against", metavar="CHECKPOINT",
        help="reference network: adds agreement, KL, L1 distance and rank correlation; a file that does not record its "
             "network and data set uses those of the first checkpoint, with its mean and std")
    add("--best", action="store_true", help="read the best epoch of run directories instead of the last")
    add("--model", metavar="NAME", help="architecture, as `model_name`, if a file does not record it")
    add("--num_channels", type=int, metavar="N", help="number of channels of the first layer of `net`")
    add("--model_options", type=_options, metavar="JSON", help="keyword arguments of the network's constructor")
    add("--dataset", metavar="NAME",
        help="data set, as `dataset`, if a file does not record it, or to evaluate on another one")
    add("--image_size", type=int, metavar="N",
        help="size in pixels of images of `folder:PATH` after resizing (default: 32)")
    add("--background", metavar="COLOR",
        help="color behind transparent pixels of images of `folder:PATH` (default: white)")
    add("--interpolation", metavar="NAME",
        help="filter that resizes images of `folder:PATH`: nearest, bilinear, bicubic or lanczos (default: bilinear)")
    add("--mean", type=float, nargs=3, metavar="M", help="mean of each channel, for pixels in [0, 1]")
    add("--std", type=float, nargs=3, metavar="S", help="standard deviation of each channel, for pixels in [0, 1]")
    add("--trigger", metavar="NAME", help="trigger of a backdoor: adds ASR, base rate and target recall")
    add("--target", type=int, default=0, metavar="N", help="target class of the trigger (default: 0)")
    add("--interface", default="logits", metavar="NAME",
        help="interface of the networks, such as label or top_k:3 (default: logits)")
    add("--answer_defense", default="none", metavar="NAME",
        help="perturbation of the answers, such as mad:0.5 (default: none)")
    add("--foreign", metavar="NAME",
        help="foreign data set, such as cifar100 or folder:PATH: adds the AUROC of separating it by confidence")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="directory of the data sets (default: data)")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    return parser


if __name__ == "__main__":
    cli.main(evaluate)
