"""Evaluation of the audited model: checks of the checkpoint, price for honest clients, profile for a student."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audits.plan import answers_display_name, interfaces
from defenses.answers import Answers
from model import build_model
from runs.audits import LABELED, NO_DATA, UNLABELED, AuditParams
from runs.trained import RECORDED, Source, read_source
from utils import seeds
from utils.data import Images
from utils.data_record import compare_origin, describe_input
from utils.datasets import Dataset, load_dataset, with_transfer_set
from utils.device import choose_device, choose_dtype, prepare_device
from utils.errors import UserError
from utils.image_folder import Decoding
from utils.networks import check_image_size
from utils.quality import chance_threshold, compute_answers, foreign_auroc, profile, quality, similarity
from utils.results import Row


@dataclass(frozen=True)
class Evaluated:
    """Metrics of the models, and the data, before any student is trained."""

    source: dict[str, str]  # path and SHA-256 of the checkpoint
    unprotected: dict[str, str] | None
    datasets: dict[str, Dataset]  # the data set, and its variants with foreign training images
    classes: int
    test_images: int
    prices: dict[str, Row]  # by the answers of clients; "unprotected": logits of that model
    remarks: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of training images of each data set."""
        return {name: len(dataset.train_images) for name, dataset in self.datasets.items()}


def evaluate_model(params: AuditParams, data_dir: Path, device: str = "auto",
                   unprotected: str | None = None) -> Evaluated:
    """Load the models and the data, and evaluate the answers that clients get.

    unprotected: checkpoint of the unprotected model. Raises UserError if a checkpoint does not fit the network or the
    data set, or if its network is hardly better than chance.
    """
    test = _Test(params, data_dir, device)
    source, logits = test.logits(params.checkpoint)
    original = test.logits(unprotected) if unprotected else None
    prices: dict[str, Row] = {}
    for interface in dict.fromkeys(["logits", *interfaces(params)]):
        for defense in dict.fromkeys(["none", *params.answer_defenses]):
            try:
                answers = Answers(interface, defense)
            except ValueError as error:
                raise UserError(f"{error}") from None
            prices[answers_display_name(interface, defense)] = test.price(params.checkpoint, logits, answers,
                                                                      original[1] if original else None)
    if original and unprotected:
        prices["unprotected"] = test.price(unprotected, original[1], Answers(), None)
    dataset = test.dataset
    return Evaluated(source.checkpoint.source, original[0].checkpoint.source if original else None, test.datasets(),
                     dataset.num_classes, len(dataset.test_labels), prices, test.remarks)


class _Test:
    """The data set of an audit, and the outputs of networks for its test images."""

    def __init__(self, params: AuditParams, data_dir: Path, device: str) -> None:
        self.params, self.data_dir = params, data_dir
        self.device = choose_device(device, None, cuda=params.cuda)
        self.dataset: Dataset = load_dataset(params.dataset, data_dir, Decoding.of(params))
        prepare_device(self.device, "fp32")
        self.dtype = choose_dtype("fp32", self.device)
        mean, std = (torch.tensor(values, device=self.device) for values in (
            params.mean or self.dataset.mean, params.std or self.dataset.std))
        self.part = Images(self.dataset.test_images.to(self.device), self.dataset.test_labels.to(self.device), mean,
                           std)
        self.remarks = list(self.dataset.warnings)
        for student in params.networks:
            self._check(student)
        self._networks: dict[str, nn.Module] = {}

    def _check(self, student: Mapping[str, Any]) -> None:
        """Raise UserError if the network of a student cannot be built for these images."""
        options = {key: value for key, value in student.items() if key == "num_channels"}
        try:
            network = build_model(student["model_name"], self.dataset.num_classes, **options,
                                  options=student.get("model_options", {}), image_size=self.dataset.image_size)
            check_image_size(network, self.dataset.image_size)
        except ValueError as error:
            raise UserError(f'"students": {error}') from None

    def logits(self, checkpoint: str) -> tuple[Source, Tensor]:
        """Logits (N, C) of the checkpoint's network for the test images."""
        given = {key: value for key, value in self.params.model_dump().items()
                 if key in RECORDED and value is not None and (key in self.params.model_fields_set or key == "dataset")}
        source = read_source(checkpoint, given=given)
        self.remarks += [text for text in compare_origin(source.checkpoint, describe_input(self.dataset, self.part),
                                                         checkpoint) if text not in self.remarks]
        network = source.build(self.dataset.num_classes, self.dataset.image_size)
        self._networks[checkpoint] = network.to(self.device).to(memory_format=torch.channels_last)
        logits = compute_answers(network, self.part, self.dtype)
        if not logits.isfinite().all():
            raise UserError(f"{checkpoint}: the outputs of the network are not finite")
        chance = 100 / self.dataset.num_classes
        accuracy = 100 * (logits.argmax(1) == self.part.labels.cpu()).double().mean().item()
        if accuracy < chance_threshold(self.dataset.num_classes):
            raise UserError(f"{checkpoint}: accuracy on the test images of {self.params.dataset} is {accuracy:.1f} %, "
                            f"hardly above chance ({chance:.1f} %): train it longer, or check the data set, the order "
                            'of its classes, "mean" and "std"')
        return source, logits

    def price(self, checkpoint: str, logits: Tensor, defend: Answers, original: Tensor | None) -> Row:
        """`quality` and `profile` of the answers, and their `similarity` to the unprotected model or, without one, to
        the logits before interface and defense."""
        answers, labels = defend(logits), self.part.labels.cpu()
        row = quality(answers, labels) | profile(answers, labels)
        if original is not None or defend.changes:
            row |= similarity(answers, original if original is not None else logits)
        if self.params.foreign:
            row["foreign_auroc"] = foreign_auroc(answers, defend(self._foreign_logits(checkpoint)))
        return row

    def datasets(self) -> dict[str, Dataset]:
        foreign = [name for name in self.params.thieves or () if name not in (LABELED, UNLABELED, NO_DATA)]
        return {self.params.dataset: self.dataset, **{name: self._transfer_set(name) for name in foreign}}

    def _transfer_set(self, name: str) -> Dataset:
        try:
            return with_transfer_set(self.dataset, name, self.data_dir, Decoding.of(self.params))
        except UserError as error:
            raise UserError(f'"{name}" is not "{LABELED}", "{UNLABELED}", "{NO_DATA}" or a data set of foreign images: '
                            f"{error}") from None

    def _foreign_logits(self, checkpoint: str) -> Tensor:
        """Logits (N, C) for foreign images, at most as many as there are test images."""
        images = self._transfer_set(str(self.params.foreign)).train_images
        drawn = torch.randperm(len(images), generator=seeds.generator("foreign"))[:len(self.part)]
        found = images[drawn].to(self.device)
        part = dataclasses.replace(self.part, images=found,
                                   labels=torch.zeros(len(found), dtype=torch.int64, device=self.device))
        return compute_answers(self._networks[checkpoint], part, self.dtype)
