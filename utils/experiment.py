"""One experiment directory: what was asked, the networks, and everything that is written there.

A stage script builds its networks through this class, hands its loss to `train`, and is done.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import nn

from utils import checkpoint, cli, distributed, seeds
from utils.checkpoint import Checkpoint
from utils.data import TrainBatches, split
from utils.datasets import load_dataset
from utils.errors import UserError
from utils.logger import Logger, say
from utils.params import P, changed_keys, load_params, parse_overrides
from utils.training import Frozen, Loss, Progress, build_optimizer, choose_dtype, evaluate, train

WRITTEN = ("training.log", "metrics.csv", "results.json", "best_model.tar", "last_model.tar", "events.out.tfevents.*")


class Experiment(Generic[P]):
    """A run of one stage in one directory.

    Everything that can be wrong with the input is found before the first file is written.
    """

    def __init__(self, kind: type[P], build_model: Callable[..., nn.Module], arguments: argparse.Namespace,
                 overrides: dict[str, Any]) -> None:
        """Read the parameters, the state of the directory and the data. Raises UserError; exits if all is done.

        kind: the parameters of the stage. build_model: as `model.build_model`. overrides: of single parameters.
        """
        self.directory: Path = arguments.save_path
        self.params = load_params(self.directory / "params.json", kind, overrides)
        self.overrides = overrides
        self.device = cli.choose_device(arguments.device, arguments.gpu_id, self.params.cuda)
        distributed.initialise(self.device)
        self.sources: dict[str, dict[str, str]] = {}
        self.restart: bool = arguments.restart
        self._find_state(arguments.resume)

        torch.backends.cudnn.benchmark = True
        self.dtype = choose_dtype(self.params.precision, self.device)
        with distributed.first_process_first():  # it alone downloads and decodes
            self.dataset = load_dataset(self.params.dataset, arguments.data_dir, image_size=self.params.image_size)
        self.parts = split(self.dataset, self.params.validation_fraction, self.params.seed, self.device)
        self._build_model = build_model
        self._frozen: dict[str, Frozen] = {}

    @classmethod
    def from_command_line(cls, kind: type[P], build_model: Callable[..., nn.Module], description: str,
                          options: Sequence[str] = ()) -> Experiment[P]:
        """As `python train_*.py` was called. `options`: parameters that the stage has as options of their own."""
        parser = cli.parser(description)
        for option in options:
            parser.add_argument(f"--{option}", metavar="CHECKPOINT", help=f"instead of `{option}` of params.json")
        arguments = parser.parse_args()
        overrides = parse_overrides(arguments.set)
        overrides |= {option: value for option in options if (value := getattr(arguments, option)) is not None}
        return cls(kind, build_model, arguments, overrides)

    # -- networks ----------------------------------------------------------------------------------------------

    def network(self, name: str, *, num_channels: int = 32, dropout_rate: float = 0.0,
                init_from: str | None = None) -> nn.Module:
        """The network to train, on the device: initial weights from the seed, or from a checkpoint."""
        network = self._build(name, "model_name", num_channels=num_channels, dropout_rate=dropout_rate)
        if init_from is not None:
            self._load_into(network, checkpoint.load(init_from, "init_from"), "init_from")
        return network

    def frozen(self, name: str, path: str, *, role: str, num_channels: int = 32) -> Frozen:
        """A trained network that only answers, from a checkpoint. `role`: what the parameters call it, `teacher`."""
        network = self._build(name, f"{role}_model", num_channels=num_channels)
        self._load_into(network, checkpoint.load(path, f"{role}_resume"), role)
        self._frozen[role] = Frozen(network)
        return self._frozen[role]

    def _build(self, name: str, key: str, **options: Any) -> nn.Module:
        torch.manual_seed(seeds.derive_seed(self.params.seed, "weights"))
        try:
            network = self._build_model(name, self.dataset.num_classes, **options)
            size = self.dataset.image_size
            with torch.inference_mode():  # an architecture that cannot take these images says so now
                network.eval()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            raise UserError(f'"{key}": {error}') from None
        return network.to(self.device, memory_format=torch.channels_last).train()

    def _load_into(self, network: nn.Module, source: Checkpoint, role: str) -> None:
        checkpoint.load_weights(network, source, role)
        self.sources[role] = source.source

    # -- what the directory holds ------------------------------------------------------------------------------

    def _find_state(self, resume: str | None) -> None:
        """Decide whether this is a new run, the rest of one, or nothing to do at all.

        Sets `_state`, the checkpoint of the run that goes on, or `_weights`, those that a new run starts from.
        """
        last, results = self.directory / "last_model.tar", self.directory / "results.json"
        given = checkpoint.load(resume, "--resume") if resume not in (None, cli.LAST) else None
        complete = given is not None and "history" in given.content
        own = complete and given.path.resolve().parent == self.directory.resolve()
        self._state: Checkpoint | None = None
        self._weights: Checkpoint | None = None
        if own and self.restart:
            raise UserError(f"--resume {resume} and --restart contradict each other: --restart would remove that file")
        if own:
            self._state = given
        elif not self.restart:
            if results.exists() and self._is_finished(results, given):
                say(f"{self.directory}: already finished, see {results} (--restart runs it again)")
                sys.exit(0)
            if last.exists():
                self._state = checkpoint.load(last, "last_model.tar (--restart starts over)")
                self._check_begun_from(given, self._state.content["sources"])
        if given and not own:
            self.sources["resume"] = given.source
            if self._state is None:
                self._state, self._weights = (given, None) if complete else (None, given)
        if self._state:
            self._check_same_run(self._state.content, self._state.path)
        elif resume == cli.LAST:
            raise UserError(f"--resume: {last} does not exist, so there is no run to continue")
        elif not self.restart and (self.directory / "best_model.tar").exists():
            raise UserError(f"{self.directory} holds a best_model.tar without a last_model.tar, which a new run would "
                            "replace: move it away, or --restart")

    def _is_finished(self, results: Path, given: Checkpoint | None) -> bool:
        try:
            done = json.loads(results.read_text(encoding="utf-8"))
            content = {"stage": done["stage"], "params": done["params"], "epoch": done["last"]["epoch"]}
            sources = done["checkpoints_read"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # last_model.tar decides
        self._check_same_run(content, results)
        self._check_begun_from(given, sources)
        return content["epoch"] == self.params.num_epochs

    def _check_begun_from(self, given: Checkpoint | None, sources: dict[str, dict[str, str]]) -> None:
        if given and sources.get("resume", {}).get("sha256") != given.sha256:
            raise UserError(f"--resume {given.path}: {self.directory} already holds a run that did not begin from it; "
                            "--restart replaces it")

    def _check_same_run(self, content: dict[str, Any], path: Path) -> None:
        if content["stage"] != self.params.script:
            raise UserError(f"{path} was written by {content['stage']} and not by {self.params.script}; --restart "
                            "replaces it")
        changed = changed_keys(content["params"], self.params)
        if content["epoch"] > self.params.num_epochs:
            changed.append(f"num_epochs ({content['epoch']} done -> {self.params.num_epochs})")
        if changed:
            raise UserError(f"{self.directory} holds a run with other parameters: {', '.join(changed)}; change them "
                            "back to continue it, or --restart to start over")

    def _restore(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Continue from the state that was found, or start from given weights, or start."""
        if self._weights:
            checkpoint.load_weights(network, self._weights, "--resume")
        if self._state is None:
            return Progress()
        content = self._state.content
        for role, then in content["sources"].items():
            now = self.sources.setdefault(role, then)
            if now["sha256"] != then["sha256"]:
                raise UserError(f"{role}: {now['path']} is not the checkpoint that this run began with; --restart to "
                                "start over")
        checkpoint.load_weights(network, self._state, "--resume")
        optimizer.load_state_dict(content["optim_dict"])
        return Progress(content["history"], content["timings"])

    def _adopt(self, progress: Progress) -> None:
        """Make the directory agree with the state that the run goes on from, whatever a kill has left there.

        A run that is continued from another directory brings its best model along.
        """
        last, best = self.directory / "last_model.tar", self.directory / "best_model.tar"
        if self._state.path.resolve() != last.resolve():
            if self._state.path.resolve().parent != self.directory.resolve():
                theirs = self._state.path.with_name("best_model.tar")
                if checkpoint.load(theirs, "--resume").content["epoch"] != progress.best["epoch"]:
                    raise UserError(f"--resume: {theirs} is not of the run of {self._state.path}")
                checkpoint.copy(theirs, best)
            checkpoint.copy(self._state.path, last)
        self._name_best(progress)

    # -- the run -----------------------------------------------------------------------------------------------

    def train(self, network: nn.Module, loss: Loss) -> None:
        """Train to the last epoch and write everything: logs, checkpoints, results.json."""
        params = self.params
        optimizer = build_optimizer(params, network)
        progress = self._restore(network, optimizer)
        batches = TrainBatches(self.parts["train"], params.batch_size,
                               self.dataset.augmentation if params.augmentation else None, params.seed)
        if not len(batches):
            raise UserError(f"{self.dataset.name}: fewer than two training images")
        self._clear()
        if self._state and distributed.rank() == 0:
            self._adopt(progress)
        logger = Logger(self.directory, progress.history)
        self._introduce(logger, network, progress, batches)

        def end_of_epoch() -> None:
            self._save(network, optimizer, progress)
            logger.epoch(progress, params.num_epochs)

        evaluated = {name: self.parts[name] for name in ("validation", "test") if name in self.parts}
        train(network, loss, optimizer, batches, evaluated, params, self.dtype, progress, end_of_epoch)
        self._finish(logger, network, progress)

    def _clear(self) -> None:
        """With --restart: remove what an earlier run has written."""
        if self.restart and distributed.rank() == 0:
            for pattern in WRITTEN:
                for path in self.directory.glob(pattern):
                    path.unlink()
        distributed.barrier()

    def _introduce(self, logger: Logger, network: nn.Module, progress: Progress, batches: TrainBatches) -> None:
        logger.info(f"{self.params.script} --save_path {self.directory}")
        logger.info(f"parameters: {json.dumps(self.params.model_dump())}")
        if self.overrides:
            logger.info(f"set on the command line: {json.dumps(self.overrides)}")
        logger.info(f"device: {self._device_name()}; processes: {distributed.world_size()}; "
                    f"precision: {str(self.dtype).removeprefix('torch.')}; torch {torch.__version__}")
        counts = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        logger.info(f"{self.dataset.name}: {self.dataset.num_classes} classes, images: {counts}")
        logger.info(f"{self.params.model_name}: {_count_parameters(network)} parameters")
        for role, source in self.sources.items():
            logger.info(f"{role}: {source['path']}, SHA-256 {source['sha256']}")
        for role, frozen in self._frozen.items():
            accuracy = evaluate(frozen.network, self.parts["test"], self.dtype)["accuracy"]
            logger.info(f"{role} network: test accuracy {accuracy:.2f} % before training")
        if "init_from" in self.sources or self._weights:
            accuracy = evaluate(network, self.parts["test"], self.dtype)["accuracy"]
            logger.info(f"the network itself: test accuracy {accuracy:.2f} % before training")
        if progress.epoch:
            logger.info(f"continues after epoch {progress.epoch}")
        else:
            images, _ = next(batches.epoch(0))
            part = self.parts["train"]
            logger.images("augmented", (images[:64] * part.std.view(3, 1, 1) + part.mean.view(3, 1, 1)).clamp(0, 1))

    def _save(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        if distributed.rank():
            return
        last = self.directory / "last_model.tar"
        checkpoint.save(last, {
            "epoch": progress.epoch, "state_dict": network.state_dict(), "optim_dict": optimizer.state_dict(),
            "stage": self.params.script, "params": self.params.model_dump(), "sources": self.sources,
            "history": progress.history, "timings": progress.timings,
        })
        self._name_best(progress)

    def _name_best(self, progress: Progress) -> None:
        if progress.best["epoch"] == progress.epoch:
            checkpoint.copy(self.directory / "last_model.tar", self.directory / "best_model.tar")

    def _finish(self, logger: Logger, network: nn.Module, progress: Progress) -> None:
        best, last = progress.best, progress.history[-1]
        seconds = sum(timing["seconds"] for timing in progress.timings)
        logger.info(f"finished: best test accuracy {best['test_accuracy']:.2f} % (epoch {best['epoch']}), "
                    f"last {last['test_accuracy']:.2f} %, {seconds:.0f} s")
        logger.close()
        if distributed.rank():
            return
        checkpoint.write_text(self.directory / "results.json", json.dumps({
            "stage": self.params.script,
            "best": best,
            "last": last,
            "wall_time_seconds": seconds,
            "images_per_second": progress.images_per_second,
            "device": self._device_name(),
            "processes": distributed.world_size(),
            "precision": str(self.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "parameters": _count_parameters(network),
            "seed": self.params.seed,
            "params": self.params.model_dump(),
            "set": self.overrides,
            "checkpoints_read": self.sources,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }, indent=1) + "\n")

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
