"""Run of a stage: parameters, data, networks and the training loop.

    run = Run.open(SCRATCH, build_model, Path("experiments/mine"))
    network = run.network()
    run.train(network, run.supervised(network, loss))

`open` reads the parameters, locks the directory and loads the data; it raises `Finished` if nothing is left to do.
`train` has the loop over epochs.
"""
from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import checkpoint, cli, data_record, distributed, interrupts, memory, resume, seeds, session
from utils.data import Images, TrainBatches, chosen_augmentation, split
from utils.datasets import Dataset, load_dataset, with_transfer_set
from utils.device import choose_device, choose_dtype, prepare_device
from utils.errors import Finished, UserError, first_line
from utils.evaluation import Evaluation, Frozen, Metric, Queries
from utils.image_folder import Decoding
from utils.method import Method
from utils.networks import Networks
from utils.params import DataParams, Params, Stage, load_params, parse_overrides
from utils.quality import chance_threshold
from utils.record import Record, loaded_lines
from utils.results import Row, interface_role
from utils.run_directory import RunDirectory
from utils.step import Loss
from utils.supervised import Supervised
from utils.training import Learner, Progress

Warn = Callable[[str, Row], str]  # (role, metrics) of a loaded network -> warning or ""


class Run:
    """Run of one stage in one directory. Invalid input raises an error before any file is written."""

    def __init__(self, params: Any, dataset: Dataset, parts: dict[str, Images], dtype: torch.dtype, *,
                 start: resume.Start, networks: Networks, record: Record, data_dir: Path) -> None:
        """See `open`."""
        self.params, self.dataset, self.parts, self.dtype = params, dataset, parts, dtype
        self._start, self._networks, self._record, self._data_dir = start, networks, record, data_dir
        self._frozen: dict[str, Frozen] = {}
        self._queries: dict[str, Callable[[int], int]] = {}  # number of queries as a function of epochs, by role

    @classmethod
    def open(cls, stage: Stage, build_model: Callable[..., nn.Module], save_path: Path, *,
             data_dir: Path = Path("data"), overrides: Mapping[str, Any] | None = None, device: str = "auto",
             gpu_id: Sequence[int] | None = None, resume_from: str | None = None, restart: bool = False) -> Run:
        """Read the parameters, lock the directory, decide how the run starts, and load the data.

        Args:
            stage: the stage of `save_path`/params.json.
            build_model: see `model.build_model`.
            overrides: values that replace those of params.json.
            device, gpu_id, resume_from, restart: the options of the command line, see `--help`.

        Raises:
            Finished: the run is finished; nothing was changed.
            UserError: invalid parameters, checkpoints, data or directory.
        """
        overrides = dict(overrides or {})
        params = load_params(save_path / "params.json", stage, overrides)
        chosen = choose_device(device, list(gpu_id) if gpu_id else None, params.cuda)
        distributed.initialize(chosen)
        directory = RunDirectory(save_path, params.artifacts)
        try:
            return cls._open(params, directory, build_model, chosen, data_dir, overrides, resume_from, restart)
        except BaseException:
            directory.unlock()
            raise

    @classmethod
    def _open(cls, params: Params, directory: RunDirectory, build_model: Callable[..., nn.Module],
              device: torch.device, data_dir: Path, overrides: dict[str, Any], resume_from: str | None,
              restart: bool) -> Run:
        """See `open`."""
        with distributed.synchronized_errors(), memory.Phase("reading checkpoints"):
            directory.lock()
            start = resume.open_start(directory, params, resume_from, restart=restart)
        if start.finished:
            distributed.shut_down()
            raise Finished(start.finished)
        decoding = memory.Phase("decoding the images", memory.reduce(params, "image_size"))
        # Only the first process downloads and decodes.
        with distributed.synchronized_errors(rank_zero_first=True), decoding:
            dataset = load_dataset(params.dataset, data_dir, Decoding.of(params),
                                   training=isinstance(params, DataParams))
            if transfer_set := getattr(params, "transfer_set", None):
                dataset = with_transfer_set(dataset, transfer_set, data_dir, Decoding.of(params))
        warnings = [*dataset.warnings, *params.ineffective_parameter_warnings(),
                    *image_size_warnings(params, dataset, start)]
        with decoding:
            parts = split(dataset, params, device)
        prepare_device(device, params.precision)  # after decoding, whose freed memory need not be kept
        dtype, data = choose_dtype(params.precision, device), data_record.describe(dataset, parts)
        networks = Networks(build_model, params, data, device)
        if start.given is not None:
            networks.sources["resume"] = start.given.source
        now = session.describe(device, dtype, overrides) | {"switches": params.switches}
        record = Record(directory, params, data, networks.sources, now)
        for text in warnings:
            record.log(text)
        return cls(params, dataset, parts, dtype, start=start, networks=networks, record=record, data_dir=data_dir)

    @classmethod
    def from_command_line(cls, stage: Stage, build_model: Callable[..., nn.Module], description: str,
                          options: Sequence[str] = ()) -> Run:
        """Open the run of a command line. description: text for --help. options: parameters with an option of their
        own."""
        parser = cli.parser(description, stage.help())
        for option in options:
            parser.add_argument(f"--{option}", type=cli.recorded, metavar="CHECKPOINT",
                                help=f"replace `{option}` of params.json")
        arguments = parser.parse_args()
        overrides = parse_overrides(arguments.set)
        own = {option: value for option in options if (value := getattr(arguments, option)) is not None}
        if twice := own.keys() & overrides.keys():
            raise UserError(f"--set and --{twice.pop()} give the same parameter")
        overrides |= own
        return cls.open(stage, build_model, arguments.save_path, data_dir=arguments.data_dir, overrides=overrides,
                        device=arguments.device, gpu_id=arguments.gpu_id, resume_from=arguments.resume,
                        restart=arguments.restart)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the directory of a run that is not trained."""
        self._record.close()

    def network(self) -> nn.Module:
        """Build the network to train, on the device, with weights from `init_from` or random ones."""
        return self._networks.trained()

    def frozen(self, role: str, answers: Callable[[Tensor], Tensor] | None = None,
               queries: Queries | None = None) -> Frozen:
        """Build a frozen network from the parameters `ROLE_model` and `ROLE_resume`.

        answers: maps logits (B, C) to the answers of the interface; None: the logits. queries: those of a thief, which
        are counted.
        """
        self._frozen[role] = Frozen(self._networks.frozen(role), answers, queries)
        return self._frozen[role]

    def replace_training_images(self, images: Tensor, labels: Tensor) -> None:
        """Replace the training images: uint8 (N, H, W, 3), labels int64 (N,)."""
        self.parts["train"] = dataclasses.replace(self.parts["train"], images=images, labels=labels)

    def supervised(self, network: nn.Module, loss: Loss, method: Method | None = None) -> Supervised:
        """Build a learner that minimizes a loss on the training images. method: module whose own parameters are trained
        too."""
        params = self.params
        if not isinstance(params, DataParams):
            raise TypeError(f"{params.script} does not learn from images")

        def start_epoch(epoch: int) -> None:
            for each in frozen:
                with distributed.synchronized_errors():
                    each.start_epoch(epoch)

        with memory.Phase("preparing the training", memory.reduce(params, "subset_fraction", "image_size")):
            batches = TrainBatches(self.parts["train"], params.batch_size, chosen_augmentation(self.dataset, params),
                                   params.seed)
            with distributed.synchronized_errors():
                frozen = self._prepare_frozen(batches)
            return Supervised(network, loss, batches, params, self.dtype, method, start_epoch)

    def log(self, text: str) -> None:
        """Write a line to the log, or buffer it until the log is open."""
        self._record.log(text)

    def train(self, network: nn.Module, learner: Learner, *, metrics: Sequence[Metric] = (),
              warnings: Sequence[Warn] = (), final: Mapping[str, Callable[[nn.Module], Any]] | None = None,
              images: Mapping[str, Tensor] | None = None, artifacts: Mapping[str, str] | None = None) -> None:
        """Train to the last epoch and write log, checkpoints and results.json.

        Must be the last call of a stage: it leaves the process group.

        Args:
            learner: trains the network for one epoch per call.
            metrics: evaluated after every epoch and on every loaded network, `metric(network, confusion) -> Row`.
            warnings: functions that check loaded networks, `warn(role, row) -> str`.
            final: functions of the trained network that return entries of `details` in results.json.
            images: (B, 3, H, W) in [0, 1] by name, logged before the first epoch.
            artifacts: texts by file name, written before the first epoch.
        """
        params, record = self.params, self._record
        smaller = memory.reduce(params, "batch_size", "synthesis_batch_size", "image_size")
        evaluate = Evaluation(self.parts, self.dtype, metrics, memory.reduce(params, "image_size"))
        try:
            progress = self._restore(network, learner)
            evaluated = self._evaluate_loaded(evaluate, network, progress)
            with distributed.synchronized_errors(), memory.Phase("preparing the training"):
                if distributed.rank() == 0:
                    record.prepare(self._start, artifacts or {})
                    if self._start.state:  # fail before the first epoch if it cannot be written
                        record.save(network, learner, progress, wait=True)
                record.open(progress)
            with memory.Phase("preparing the training"):
                warnings = [warn_about_chance(self.dataset.num_classes), *warnings]
                record.log_header(network, progress, self._networks, self.parts, loaded_lines(evaluated, warnings))
                if not progress.epoch:
                    record.images({**learner.first_images(), **(images or {})}, 0)
                learner.setup(self.log)
            while progress.epoch < params.num_epochs:
                epoch, start = progress.epoch, time.perf_counter()
                torch.manual_seed(seeds.derive_seed(params.seed, "dropout", epoch, distributed.rank()))
                with memory.Phase(f"epoch {epoch + 1}", f"{smaller}; saved checkpoints are kept"):
                    terms = learner.epoch(epoch, f"epoch {epoch + 1}/{params.num_epochs}")
                trained = time.perf_counter()
                row = {"epoch": epoch + 1, **terms, **evaluate(network)}
                if bad := [name for name, value in row.items() if not math.isfinite(value)]:
                    raise UserError(f"epoch {epoch + 1}: not finite: {', '.join(bad)}; saved checkpoints are kept")
                progress.add(row, images_per_second=learner.num_images / (trained - start),
                             seconds=time.perf_counter() - start)
                with interrupts.deferred(), distributed.synchronized_errors():
                    record.epoch(network, learner, progress)
            with distributed.synchronized_errors():
                record.finish(network, progress, evaluated, final or {},
                              {role: count(progress.epoch) for role, count in self._queries.items()})
        except BaseException as error:
            reason = interrupts.find_interrupt(error) or error
            record.close(reason if isinstance(reason, UserError | OSError | KeyboardInterrupt) else None)
            raise
        record.close()
        distributed.shut_down()  # not after a failure, when the group ends with the process

    def _prepare_frozen(self, batches: TrainBatches) -> list[Frozen]:
        """Prepare the answers of the frozen networks to the training images, as the parameters ask for."""
        directory = self._data_dir / "cache" if getattr(self.params, "teacher_cache", False) else None
        for role, frozen in self._frozen.items():
            weights = checkpoint.weights_id(self._networks.sources[role])
            frozen.prepare(weights, self.dataset.num_classes, batches, self.dtype, directory, self.log)
            if frozen.queries:
                self._queries[role] = partial(frozen.queries.count, len(batches.part), batches.usable)
        return list(self._frozen.values())

    def _restore(self, network: nn.Module, learner: Learner) -> Progress:
        """Restore weights, learner and progress of a resumed run, or the initial weights of a new one."""
        state, sources = self._start.state, self._networks.sources
        if self._start.weights:
            checkpoint.load_weights(network, self._start.weights, "--resume")
        if state is None:
            self._record.start_session(Progress())
            return Progress()
        restart = f"--restart removes the run in {self._record.directory.path} and starts over"
        for role, then in state.content["sources"].items():
            now = sources.setdefault(role, then)
            if role != "resume" and checkpoint.weights_id(now) != checkpoint.weights_id(then):
                raise UserError(f"{role}: {now['path']} is not the checkpoint that this run started with; {restart}")
        if changed := data_record.changes(state.content["data"], self._record.data):
            raise UserError(f"{self.params.dataset} has changed since this run started ({', '.join(changed)}): restore "
                            f"the data, or {restart}")
        checkpoint.load_weights(network, state, "--resume")
        try:
            learner.load_state_dict(resume.learner_state(state))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{state.path} does not fit: the state of the optimizer or of the method has another shape "
                            f"({first_line(error)})") from None
        progress = resume.progress_of(state)
        self._record.start_session(progress, state.content["sessions"])
        return progress

    def _evaluate_loaded(self, evaluate: Evaluation, network: nn.Module, progress: Progress) -> dict[str, Row]:
        """Metrics of every loaded network, by role. Raises UserError if they are not finite."""
        loaded = {}
        for role, frozen in self._frozen.items():
            loaded[f"{role} network, frozen"] = frozen.network
            if frozen.answers and not getattr(frozen.answers, "ordered", False):  # each batch would restart the order
                loaded[interface_role(role, str(frozen.answers))] = frozen.with_interface
        if not progress.epoch and ("init_from" in self._networks.sources or self._start.weights):
            loaded["the network itself, before training"] = network
        rows = {role: evaluate(each) for role, each in loaded.items()}
        for role, row in rows.items():
            if not all(math.isfinite(value) for name, value in row.items() if name.endswith("_loss")):
                raise UserError(f"{role}: the outputs of the loaded network are not finite")
        return rows


def warn_about_chance(num_classes: int) -> Warn:
    """Warn about loaded networks that are hardly better than chance, as networks on unknown data are."""
    def warn(_: str, row: Row) -> str:
        return "hardly better than chance: is this the right checkpoint and data set?" * (
            row["test_accuracy"] < chance_threshold(num_classes))
    return warn


def image_size_warnings(params: Params, dataset: Dataset, start: resume.Start) -> list[str]:
    """Warn about an `image_size` other than that of the data set. Raises UserError for a new run, which would train on
    other images than asked for; resumed runs get a warning."""
    asked, size = params.image_size, dataset.image_size
    if asked == size or "image_size" not in params.model_fields_set:
        return []
    text = f'"image_size" {asked} has no effect: the images of {params.dataset} are {size}x{size}'
    if not start.state:
        raise UserError(f"{text}, and only folder:PATH images are resized: leave it out")
    return [text]
