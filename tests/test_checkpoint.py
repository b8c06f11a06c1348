"""Checkpoints: nothing is executed, nothing half-written is left, and what does not fit is named."""
import io
import pickle

import pytest
import torch
from conftest import Malicious
from torch import nn

from model import build_model
from utils import checkpoint, files
from utils.errors import UserError

WEIGHTS = build_model("net", 10, num_channels=4).state_dict()


def message(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def net(num_classes=10, num_channels=4):
    return build_model("net", num_classes, num_channels=num_channels)


@pytest.mark.parametrize("content", [
    {"epoch": 3, "state_dict": WEIGHTS, "optim_dict": {"state": {}, "param_groups": []}},
    {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}, "optim_dict": {}},
    WEIGHTS,
], ids=["published", "from several GPUs", "bare state dict"])
def test_a_checkpoint_in_any_published_form_loads(tmp_path, content):
    torch.save(content, tmp_path / "best_model.tar")
    network = net()
    checkpoint.load_weights(network, checkpoint.load(tmp_path / "best_model.tar"))
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in network.state_dict().items())


def test_the_old_format_of_torch_loads_too(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    checkpoint.load_weights(net(), checkpoint.load(tmp_path / "old.tar"))


@pytest.mark.parametrize("write, words", [
    (lambda content, path: torch.save(content, path), "not executed"),
    (lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False), "not executed"),
    (lambda content, path: path.write_bytes(pickle.dumps(content)), "not a checkpoint"),
], ids=["torch.save", "torch.save of old", "pickle"])
def test_a_malicious_pickle_executes_nothing(tmp_path, write, words):
    victim = tmp_path / "executed"
    write({"epoch": 1, "state_dict": WEIGHTS, "optim_dict": Malicious(victim)}, tmp_path / "evil.tar")
    assert words in message(checkpoint.load, tmp_path / "evil.tar")
    assert not victim.exists()


def test_the_malicious_pickle_of_these_tests_would_execute(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    assert "teacher: " in message(checkpoint.load, tmp_path / "no.tar", "teacher")
    assert str(tmp_path / "no.tar") in message(checkpoint.load, tmp_path / "no.tar")
    assert "directory" in message(checkpoint.load, tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS}, buffer)
    data = buffer.getvalue()
    (tmp_path / "best_model.tar").write_bytes(data[:int(share * len(data))])
    text = message(checkpoint.load, tmp_path / "best_model.tar")
    assert str(tmp_path / "best_model.tar") in text
    assert "truncated or not a checkpoint" in text


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>404 Not Found</html>", b"\x80\x02junk", b"PK\x03\x04junk"])
def test_a_file_that_is_no_checkpoint_is_not_called_malicious(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    assert "truncated or not a checkpoint" in message(checkpoint.load, tmp_path / "x.tar")


def test_a_truncated_file_of_the_old_format_is_named(tmp_path):
    torch.save({"state_dict": WEIGHTS}, tmp_path / "x.tar", _use_new_zipfile_serialization=False)
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:-100])
    assert "truncated or not a checkpoint" in message(checkpoint.load, tmp_path / "x.tar")


@pytest.mark.parametrize("content", [{"epoch": 1}, [1, 2], {"state_dict": {"conv1.weight": 3}}, {}, torch.ones(3),
                                     {"state_dict": {0: torch.ones(3)}}])
def test_a_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.tar")
    assert "no state_dict" in message(checkpoint.load, tmp_path / "x.tar")


def mismatch(tmp_path, weights, network):
    torch.save({"state_dict": weights}, tmp_path / "x.tar")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    text = message(checkpoint.load_weights, network, checkpoint.load(tmp_path / "x.tar"), "teacher")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert str(tmp_path / "x.tar") in text
    return text


def test_the_first_shape_that_differs_is_named_with_both_shapes(tmp_path):
    text = mismatch(tmp_path, WEIGHTS, net(num_channels=8))
    assert "conv1.weight has shape (4, 3, 3, 3) there and (8, 3, 3, 3) here" in text


def test_another_class_count_is_called_so(tmp_path):
    text = mismatch(tmp_path, net(num_classes=100).state_dict(), net())
    assert "it knows 100 classes, the data set has 10" in text


def test_a_missing_and_a_surplus_name_are_named(tmp_path):
    fewer = {name: tensor for name, tensor in WEIGHTS.items() if name != "bn2.bias"}
    assert "no bn2.bias (shape (8,))" in mismatch(tmp_path, fewer, net())
    assert "extra (shape (1,))" in mismatch(tmp_path, {**WEIGHTS, "extra": torch.ones(1)}, net())


def test_the_checkpoint_knows_the_hash_of_what_it_read(tmp_path):
    import hashlib
    torch.save({"state_dict": WEIGHTS}, tmp_path / "x.tar")
    expected = hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest()
    assert checkpoint.load(tmp_path / "x.tar").source == {"path": str(tmp_path / "x.tar"), "sha256": expected}


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last_model.tar"
    checkpoint.save({"epoch": 1, "state_dict": WEIGHTS}, path)
    before = path.read_bytes()
    (tmp_path / ".last_model.tar.tmp").symlink_to("/dev/full")  # every write there fails with ENOSPC
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2, "state_dict": WEIGHTS}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_keeps_its_bytes_when_the_original_is_saved_again(tmp_path):
    last, best = tmp_path / "last_model.tar", tmp_path / "best_model.tar"
    checkpoint.save({"epoch": 1, "state_dict": WEIGHTS}, last)
    files.copy(last, best)
    checkpoint.save({"epoch": 2, "state_dict": WEIGHTS}, last)
    assert checkpoint.load(best).content["epoch"] == 1
    files.copy(last, best)
    assert checkpoint.load(best).content["epoch"] == 2


def test_best_and_last_model_are_two_files_though_they_are_the_same_epoch(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    with open(directory / "best_model.tar", "r+b") as file:
        file.truncate(10)
    assert checkpoint.load(directory / "last_model.tar").content["epoch"] == 1


def test_a_network_without_a_classifier_of_its_own_still_loads(tmp_path):
    """A user's network of vectors only, where no entry is a matrix."""
    network = nn.BatchNorm2d(3)
    torch.save(network.state_dict(), tmp_path / "x.tar")
    checkpoint.load_weights(nn.BatchNorm2d(3), checkpoint.load(tmp_path / "x.tar"))
    torch.save(nn.BatchNorm2d(4).state_dict(), tmp_path / "x.tar")
    assert "weight" in message(checkpoint.load_weights, network, checkpoint.load(tmp_path / "x.tar"))
