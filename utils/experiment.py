"""One experiment directory: what was asked, the networks, and everything that is written there.

A stage script builds its networks through this class, hands its loss to `train`, and is done.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from utils import (
    checkpoint,
    cli,
    data_record,
    distributed,
    files,
    interrupts,
    memory,
    resume,
    seeds,
    session,
)
from utils.augment import denormalise
from utils.checkpoint import Checkpoint
from utils.data import TrainBatches, chosen_augmentation, split
from utils.datasets import load_dataset
from utils.device import choose_device, choose_dtype, prepare_device
from utils.errors import UserError, first_line
from utils.evaluation import Frozen, accuracy, confusion_matrix, evaluate
from utils.logger import Logger, percentages, say
from utils.params import DataParams, ParamsType, TeacherParams, load_params, parse_overrides, without_effect
from utils.step import Loss
from utils.supervised import Supervised
from utils.teacher_cache import TeacherCache
from utils.training import Learner, Progress, Row, train

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one directory are not kept apart
    fcntl = None

Kinds = type[ParamsType] | Mapping[str, type[ParamsType]]
WRITTEN = ("training.log", "metrics.csv", "results.json", "best_model.tar", "last_model.tar", "events.out.tfevents.*",
           "poisoned.json", "augmented.png", "poisoned.png", "synthetic.png", "perturbation.png")


class Experiment(Generic[ParamsType]):
    """A run of one stage in one directory.

    Everything that can be wrong with the input is found before the first file is written.
    """

    def __init__(self, kind: Kinds, build_model: Callable[..., nn.Module], arguments: argparse.Namespace,
                 overrides: dict[str, Any]) -> None:
        """Read the parameters, the state of the directory and the data. Raises UserError; exits if all is done.

        kind: the parameters of the stage, or of each of its methods. build_model: as `model.build_model`. overrides: of
        single parameters.
        """
        self.directory: Path = arguments.save_path
        self.params = load_params(self.directory / "params.json", kind, overrides)
        self.restart: bool = arguments.restart
        self.device = choose_device(arguments.device, arguments.gpu_id, self.params.cuda)
        distributed.initialise(self.device)
        self.dtype = choose_dtype(self.params.precision, self.device)

        with distributed.together(), memory.Phase("reading checkpoints"):
            self._lock()
            insist = arguments.resume == cli.LAST
            given = checkpoint.load(arguments.resume, "--resume") if arguments.resume and not insist else None
            self.start = resume.decide(self.directory, self.params, given=given, insist=insist, restart=self.restart)
            if not self.start.finished:
                self._check_checkpoints()  # sooner than after a download
        if self.start.finished:
            say(self.start.finished)
            distributed.shut_down()
            sys.exit(0)
        # The checkpoints that were read, by role; one of this very directory is this run's own.
        self.sources = {"resume": given.source} if given and not resume.lies_in(self.directory, given) else {}

        decoding = memory.Phase("decoding the images", memory.reduce(self.params, "image_size"))
        with distributed.together(first_first=True), decoding:  # the first process alone downloads and decodes
            self.dataset = load_dataset(self.params.dataset, arguments.data_dir, image_size=self.params.image_size,
                                        background=self.params.background,
                                        training=isinstance(self.params, DataParams))
        with decoding:
            self.parts = split(self.dataset, self.params, self.device)
            self.data = data_record.describe(self.dataset, self.parts)
        prepare_device(self.device, self.params.precision)  # after the data, whose decoding frees much for good
        self._build_model = build_model
        self._frozen: dict[str, Frozen] = {}
        self._cache_directory: Path = arguments.data_dir / "cache"
        self._writer = checkpoint.Writer()
        self.session = session.describe(self.device, self.dtype, overrides)
        self.session["switches"] = {key: getattr(self.params, key) for key in ("compile", "cuda_graph", "teacher_cache")
                                    if hasattr(self.params, key)}
        self.sessions: list[dict[str, Any]] = []  # of the calls that the run took, this one at the end
        # What else is to be measured of a network, given its confusion matrix on the test images too.
        self.examine: list[Callable[[nn.Module, Tensor], Row]] = []
        # What is to be said of a loaded network, given what it is and such a row, or nothing.
        self.doubts: list[Callable[[str, Row], str]] = [functools.partial(_doubt_a_guess, self.dataset.num_classes)]
        # What else is to be known of the network in the end, for results.json.
        self.details: dict[str, Callable[[nn.Module], Any]] = {}
        self.pictures: dict[str, Tensor] = {}  # (B, 3, H, W) in [0, 1], to look at before the first epoch
        self.texts: dict[str, str] = {}  # text by name, written before the first epoch
        self._logger: Logger | None = None
        self._remarks = [*self.dataset.remarks, *without_effect(self.params), *self._image_size_remarks()]

    @classmethod
    def from_command_line(cls, kind: Kinds,
                          build_model: Callable[..., nn.Module], description: str,
                          options: Sequence[str] = ()) -> Experiment[ParamsType]:
        """As `python train_*.py` was called. `options`: parameters that the stage has as options of their own."""
        parser = cli.parser(description)
        for option in options:
            parser.add_argument(f"--{option}", type=cli.recorded, metavar="CHECKPOINT",
                                help=f"instead of `{option}` of params.json")
        arguments = parser.parse_args()
        overrides = parse_overrides(arguments.set)
        own = {option: value for option in options if (value := getattr(arguments, option)) is not None}
        if twice := own.keys() & overrides.keys():
            raise UserError(f"--set and --{twice.pop()} give the same parameter")
        overrides |= own
        return cls(kind, build_model, arguments, overrides)

    # -- networks ----------------------------------------------------------------------------------------------

    def network(self) -> nn.Module:
        """The network to train, on the device: initial weights from the seed, or from the checkpoint `init_from`."""
        with self._building("model_name"):
            network = self._build(self.params.model_name, "model_name", num_channels=self.params.num_channels,
                                  dropout_rate=self.params.dropout_rate)
            if init_from := self.params.init_from:
                self._load_into(network, checkpoint.load(init_from, "init_from"), "init_from")
            return network

    def frozen(self, name: str, path: str, *, role: str, num_channels: int = 32) -> Frozen:
        """A trained network that only answers, from a checkpoint. `role`: what the parameters call it, `teacher`."""
        with self._building(f"{role}_model"):
            network = self._build(name, f"{role}_model", num_channels=num_channels)
            self._load_into(network, checkpoint.load(path, f"{role}_resume"), role)
            self._frozen[role] = Frozen(network)
            return self._frozen[role]

    def _building(self, key: str) -> memory.Phase:
        remedies = [f'choose a smaller network ("{key}")', memory.reduce(self.params, "image_size")]
        return memory.Phase("building the network", " or ".join(filter(None, remedies)))

    def _build(self, name: str, key: str, **options: Any) -> nn.Module:
        # A student must not start from the very weights from which its teacher started.
        stream = "student" if isinstance(self.params, TeacherParams) else "weights"
        torch.manual_seed(seeds.derive_seed(self.params.seed, stream))
        try:
            network = self._build_model(name, self.dataset.num_classes, **options)
        except ValueError as error:
            raise UserError(f'"{key}": {error}') from None
        size = self.dataset.image_size
        try:
            with torch.inference_mode():  # an architecture that cannot take these images says so now
                network.eval()(torch.zeros(1, 3, size, size))
        except (ValueError, RuntimeError) as error:
            hint = ', as "image_size" says' if self.params.dataset.startswith("folder:") else ""
            raise UserError(f'"{key}": {" ".join(str(error).split())}{hint}') from None
        return network.to(self.device, memory_format=torch.channels_last).train()

    def _load_into(self, network: nn.Module, source: Checkpoint, role: str) -> None:
        checkpoint.load_weights(network, source, role)
        for remark in data_record.compare_origin(source, self.data, role):
            self.log(remark)
        self.sources[role] = source.source

    # -- the run -----------------------------------------------------------------------------------------------

    def replace_training_images(self, images: Tensor, labels: Tensor) -> None:
        """Train on these, uint8 (N, H, W, 3) and int64 (N,), in place of the images of the data set."""
        self.parts["train"] = dataclasses.replace(self.parts["train"], images=images, labels=labels)

    def train(self, network: nn.Module, loss: Loss) -> None:
        """Train on the training images to the last epoch and write everything: logs, checkpoints, results.json.

        The last thing that a stage does: processes that shared the work are alone afterwards.
        """
        params = self.params

        def start_of_epoch(epoch: int) -> None:
            for cache in caches:
                with distributed.together():
                    cache.start_epoch(epoch)

        with memory.Phase("preparing the training", memory.reduce(params, "subset_fraction", "image_size")):
            batches = TrainBatches(self.parts["train"], params.batch_size, chosen_augmentation(self.dataset, params),
                                   params.seed)
            with distributed.together():
                caches = self._caches(batches)
            images, part = next(batches.epoch(0)).images, self.parts["train"]
            self.pictures["augmented"] = denormalise(images[:64], part.mean, part.std)
            learner = Supervised(network, loss, batches, params, self.dtype, start_of_epoch)
        self.run(network, learner)

    def run(self, network: nn.Module, learner: Learner) -> None:
        """As `train`, by any learner of the network."""
        params = self.params
        progress = self._restore(network, learner)
        known = self.known = {f"{role} network, frozen": self._check(frozen.network, role)
                              for role, frozen in self._frozen.items()}
        if not progress.epoch and ("init_from" in self.sources or self.start.weights):
            known["the network itself, before training"] = self._check(network, "the network itself")
        self.sessions.append({"after_epoch": progress.epoch, **self.session})
        with distributed.together(), memory.Phase("preparing the training"):
            if distributed.rank() == 0:
                self._prepare(network, learner, progress)
            logger = self._logger = Logger(self.directory, progress.history)

        saving = memory.Phase("saving the epoch", "what was saved after an earlier one is kept")

        def end_of_epoch() -> None:
            with interrupts.held(), distributed.together(), saving:
                self._save(network, learner, progress)
                logger.epoch(progress, params.num_epochs)
                if progress.epoch % max(1, params.num_epochs // 10) == 0:
                    for name, images in learner.pictures().items():
                        logger.images(name, images, progress.epoch)

        try:
            with memory.Phase("preparing the training"):
                self._introduce(logger, network, progress, known)
                learner.begin(self.log)
            train(network, learner, self.evaluate, params, progress, end_of_epoch)
            with distributed.together(), memory.Phase("evaluating the finished network"):
                self._finish(logger, network, progress)
        except (UserError, OSError, KeyboardInterrupt) as error:
            logger.stopped(error)
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk: said already
                self._writer.wait()
            logger.close()
            self._unlock()
        distributed.shut_down()  # not after a failure: then the process ends, and its group with it

    def evaluate(self, network: nn.Module) -> Row:
        """What a network is worth: accuracy and loss on the held-out and the test images, and what `examine` adds."""
        row = {}
        with memory.Phase("evaluating the network", memory.reduce(self.params, "image_size")):
            if "validation" in self.parts:
                row = {f"validation_{key}": value
                       for key, value in evaluate(network, self.parts["validation"], self.dtype).items()}
            counts, loss = confusion_matrix(network, self.parts["test"], self.dtype)
            row |= {"test_accuracy": accuracy(counts), "test_loss": loss}
            for examine in self.examine:
                row |= examine(network, counts)
        return row

    def _restore(self, network: nn.Module, learner: Learner) -> Progress:
        """Weights, learner and progress of the run that goes on, or the weights that a new one starts from."""
        state, weights = self.start.state, self.start.weights
        if weights:
            checkpoint.load_weights(network, weights, "--resume")
        if state is None:
            return Progress()
        for role, then in state.content["sources"].items():
            now = self.sources.setdefault(role, then)
            if role != "resume" and checkpoint.weights_id(now) != checkpoint.weights_id(then):
                raise UserError(f"{role}: {now['path']} is not the checkpoint that this run began with; --restart "
                                f"removes the run in {self.directory} and starts over")
        if changed := data_record.changes(state.content["data"], self.data):
            raise UserError(f"{self.params.dataset} is not what this run began with: its {', '.join(changed)} changed; "
                            f"put the old data back, or --restart removes the run in {self.directory} and starts over")
        self.sessions = state.content["sessions"]
        checkpoint.load_weights(network, state, "--resume")
        try:
            learner.load_state_dict(state.content)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{state.path} does not fit: the state of its optimiser, or what else it keeps, has "
                            f"another shape ({first_line(error)})") from None
        return resume.progress_of(state)

    def _caches(self, batches: TrainBatches) -> list[TeacherCache]:
        """What remembers the logits of each frozen network, if that is asked for and can be done."""
        if not getattr(self.params, "teacher_cache", False):
            return []
        if batches.views is None:
            self.log(f"teacher_cache: not used, {batches.augmentation} makes views without number")
            return []
        return [TeacherCache(frozen, checkpoint.weights_id(self.sources[role]), self.dataset.num_classes, batches,
                             self.dtype, self._cache_directory, self.log) for role, frozen in self._frozen.items()]

    def _image_size_remarks(self) -> list[str]:
        """A remark for a run that goes on with an `image_size` that its data set does not have; of a new run an error:
        whoever set it would train on other images than they think."""
        asked, size = self.params.image_size, self.dataset.image_size
        if asked == size or "image_size" not in self.params.model_fields_set:
            return []
        text = f'"image_size" {asked} has no effect: the images of {self.params.dataset} are {size}x{size}'
        if not self.start.state:
            raise UserError(f"{text}, and only those of folder:PATH are resized; leave it out")
        return [text]

    def _check_checkpoints(self) -> None:
        """The checkpoints that the parameters name: all there, and none that this run would remove or override."""
        for key, path in self.params.checkpoints().items():
            checkpoint.check_exists(path, key)
            if self.restart and files.split_key(path)[0].resolve() in [old.resolve() for old in self._written()]:
                raise UserError(f"{key}: --restart would remove {path}: move it to another directory first")
        if self.start.weights and self.params.init_from:
            raise UserError(f"--resume {self.start.weights.path} and init_from {self.params.init_from} contradict each "
                            "other: both are weights to start from")

    def _written(self) -> Iterator[Path]:
        """What a run has written in the directory."""
        return (path for pattern in WRITTEN for path in self.directory.glob(pattern))

    def _lock(self) -> None:
        """Keep other processes from training in this directory as long as this object or its process lives."""
        self._unlock: Callable[[], Any] = lambda: None
        if distributed.rank() or fcntl is None:
            return
        handle = os.open(self.directory, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {self.directory}") from None
        except OSError:
            pass  # a file system without locks

    def _prepare(self, network: nn.Module, learner: Learner, progress: Progress) -> None:
        """Make the directory that of the run that begins: nothing of an old one, or all of the one that goes on."""
        if not os.access(self.directory, os.W_OK):
            raise UserError(f"cannot write in {self.directory}: Permission denied")
        if self.restart:
            for path in list(self._written()):
                path.unlink()
        (self.directory / "results.json").unlink(missing_ok=True)  # not before the run is finished again
        for name, text in self.texts.items():
            files.write_text(self.directory / name, text)
        if self.start.state:
            best = self.directory / "best_model.tar"
            if self.start.best.path.resolve() not in (best.resolve(), self.start.state.path.resolve()):
                files.copy(self.start.best.path, best)
            self._save(network, learner, progress)
            self._writer.wait()  # what cannot be written is to be known before the first epoch

    def _check(self, network: nn.Module, role: str) -> Row:
        """What a network that was loaded is worth."""
        row = self.evaluate(network)
        if not all(math.isfinite(value) for name, value in row.items() if name.endswith("_loss")):
            raise UserError(f"{role}: the outputs of the network that was loaded are not finite")
        return row

    def log(self, text: str) -> None:
        """A line in the log, or among its first lines where it is not open yet."""
        if self._logger:
            self._logger.info(text)
        else:
            self._remarks.append(text)

    def _introduce(self, logger: Logger, network: nn.Module, progress: Progress, known: dict[str, Row]) -> None:
        logger.info(f"{self.params.script} --save_path {self.directory}")
        logger.info(f"parameters: {json.dumps(self.params.model_dump())}")
        if self.session["set"]:
            logger.info(f"set on the command line: {json.dumps(self.session['set'])}")
        logger.info("device: {device}; processes: {processes}; precision: {precision}; torch {versions[torch]}".format(
            **self.session))
        if progress.epoch and self.sessions[-2]["precision"] != self.session["precision"]:
            logger.info(f"precision: {self.sessions[-2]['precision']} until epoch {progress.epoch}")
        if self.params.precision == "bf16" and choose_dtype("auto", self.device) != self.dtype:
            logger.info("precision: this device emulates bfloat16, which is slow")
        counts = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        logger.info(f"{self.dataset.name}: {self.dataset.num_classes} classes, images: {counts}")
        logger.info(f"{self.params.model_name}: {_count_parameters(network)} parameters")
        for role, source in self.sources.items():
            key = f"#{source['key']}" if "key" in source else ""
            logger.info(f"{role}: {source['path']}{key}, SHA-256 {source['sha256']}")
        for role, row in known.items():
            doubts = "".join(f" ({text})" for doubt in self.doubts if (text := doubt(role, row)))
            logger.info(f"{role}: {percentages(row)}{doubts}")
        for text in self._remarks:
            logger.info(text)
        if progress.epoch:
            logger.info(f"continues after epoch {progress.epoch}, to epoch {self.params.num_epochs}")
        else:
            for title, images in self.pictures.items():
                logger.images(title, images, 0)

    def _save(self, network: nn.Module, learner: Learner, progress: Progress) -> None:
        """last_model.tar, and the same file as best_model.tar if no epoch was better."""
        if distributed.rank():
            return
        best = [self.directory / "best_model.tar"] if progress.best["epoch"] == progress.epoch else []
        self._writer.save({
            "epoch": progress.epoch, "state_dict": network.state_dict(), **learner.state_dict(),
            "stage": self.params.script, "params": self.params.model_dump(), "data": self.data,
            "sources": self.sources, "sessions": self.sessions, "history": progress.history,
            "timings": progress.timings,
        }, self.directory / "last_model.tar", *best)

    def _finish(self, logger: Logger, network: nn.Module, progress: Progress) -> None:
        self._writer.wait()
        best, last = progress.best, progress.history[-1]
        seconds = sum(timing["seconds"] for timing in progress.timings)
        chosen = "validation" if "validation_accuracy" in best else "test"
        logger.info(f"finished: test accuracy {best['test_accuracy']:.2f} % at the epoch that is best on the {chosen} "
                    f"images ({best['epoch']}), {last['test_accuracy']:.2f} % at the last; {seconds:.0f} s")
        details = {name: detail(network) for name, detail in self.details.items()}  # in all processes, which share it
        if distributed.rank():
            return
        files.write_text(self.directory / "results.json", json.dumps({
            "stage": self.params.script,
            "best": best,
            "last": last,
            "wall_time_seconds": seconds,
            "images_per_second": progress.images_per_second,
            **self.session,
            "sessions": self.sessions,
            "data": self.data,
            "num_parameters": _count_parameters(network),
            "seed": self.params.seed,
            "params": self.params.model_dump(),
            "checkpoints_read": self.sources,
            "evaluated_before": self.known,
            "details": details,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }, indent=1) + "\n")


def _doubt_a_guess(num_classes: int, _: str, row: Row) -> str:
    guess = 100 / num_classes
    hardly_better = row["test_accuracy"] < guess + (100 - guess) / 10  # a network on data that it does not know
    return "hardly better than a guess: is it the right checkpoint, on the right data?" * hardly_better


def _count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
