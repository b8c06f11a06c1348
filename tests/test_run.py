"""Runs through the Python API: finished runs, and release of the directory lock."""
import pytest
import torch

from model import build_model
from runs.stages import SCRATCH
from utils.errors import Finished, UserError
from utils.losses import cross_entropy
from utils.run import Run


def loss(network, batch):
    return {"loss": cross_entropy(network(batch.images), batch.labels)}


def opened(directory, **options):
    return Run.open(SCRATCH, build_model, directory, data_dir=directory, device="cpu", **options)


def test_opening_a_finished_run_raises(experiment):
    directory = experiment(num_epochs=1)
    run = opened(directory)
    network = run.network()
    run.train(network, run.supervised(network, loss))
    with pytest.raises(Finished, match="already finished, 1 epochs"):
        opened(directory)


def test_the_directory_lock_is_released_after_errors_and_with_blocks(experiment):
    directory = experiment(num_epochs=1)
    with pytest.raises(UserError, match="nowhere") as kept:  # a stored error keeps its frames alive
        opened(directory, overrides={"dataset": "folder:/nowhere"})
    with opened(directory) as run:
        with pytest.raises(UserError, match="another process is training"):
            opened(directory)
    run = opened(directory)
    network = run.network()
    with pytest.raises(UserError, match="not finite") as also_kept:
        run.train(network, run.supervised(network, lambda network, batch: {
            "loss": network(batch.images).sum() * torch.nan}))
    with opened(directory):
        assert kept and also_kept
