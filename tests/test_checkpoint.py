"""Checkpoints: loading executes no code, writing is atomic, and mismatches are named."""
import argparse
import io
import pickle
import shlex
import tarfile

import numpy as np
import pytest
import torch
from conftest import Malicious
from safetensors.torch import save_file
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


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


def loaded(path, network=None):
    network = network or net()
    checkpoint.load_weights(network, checkpoint.load(path))
    return network.state_dict()


def equal(state_dict, tolerance=0.0):
    return all(torch.allclose(tensor, WEIGHTS[name], atol=tolerance) for name, tensor in state_dict.items())


@pytest.mark.parametrize("content", [
    {"epoch": 3, "state_dict": WEIGHTS, "optim_dict": {"state": {}, "param_groups": []}},
    {"epoch": 3, "state_dict": prefixed("module."), "optim_dict": {}},
    WEIGHTS,
    prefixed("_orig_mod.module."),
    prefixed("module._orig_mod."),
    prefixed("model.module.module."),
    {name.replace("bn1.", "bn1._orig_mod."): tensor for name, tensor in WEIGHTS.items()},
    {"n_averaged": torch.tensor(7), **prefixed("module.")},
    {name: tensor for name, tensor in prefixed("module.").items() if "num_batches_tracked" not in name},
    {"state_dict_ema": WEIGHTS, "epoch": 3},
    {"model": {"state_dict": WEIGHTS}},
    {"net": WEIGHTS, "accuracy": np.float64(93.5), "rest": [np.int16(-3), np.bool_(True), np.str_("é")]},
], ids=["published", "several GPUs", "bare state dict", "compiled of several GPUs", "several GPUs of compiled",
        "Lightning", "compiled in parts", "averaged", "torch 0.4", "timm", "nested", "NumPy scalars"])
def test_a_checkpoint_in_any_published_form_loads(tmp_path, content):
    torch.save(content, tmp_path / "best_model.tar")
    assert equal(loaded(tmp_path / "best_model.tar"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_into_a_network_of_float32(tmp_path, dtype):
    torch.save({name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}, tmp_path / "half.pt")
    state = loaded(tmp_path / "half.pt")
    assert state["conv1.weight"].dtype == torch.float32
    assert equal(state, tolerance=0.01)


@pytest.mark.parametrize("name", ["model.safetensors", "model.tar"])
def test_safetensors_load_with_any_file_name(tmp_path, name):
    save_file(prefixed("module."), tmp_path / name)
    assert equal(loaded(tmp_path / name))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    assert "truncated or damaged safetensors" in message(checkpoint.load, tmp_path / name)


def test_a_network_may_have_a_wrapper_s_name_in_its_own_names(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.tar")
    inner = net()
    loaded(tmp_path / "x.tar", nn.ModuleDict({"model": inner}))
    assert equal(inner.state_dict())


def test_numpy_scalars_keep_type_and_value(tmp_path):
    values = [np.float64(0.5), np.float32(1.5), np.int64(-3), np.uint8(255), np.bool_(True), np.dtype(">i4").type(7)]
    torch.save({"state_dict": WEIGHTS, "values": values}, tmp_path / "x.tar")
    read = checkpoint.load(tmp_path / "x.tar").content["values"]
    assert [(type(value), value) for value in read] == [(type(value), value) for value in values]
    torch.save({"state_dict": WEIGHTS, "values": values}, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "old.tar").read_bytes()  # uncompressed, without checksums
    (tmp_path / "old.tar").write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert checkpoint.load(tmp_path / "old.tar").content["values"] == values


def test_torch_load_elsewhere_in_the_process_is_unchanged(tmp_path):
    torch.save({"state_dict": WEIGHTS, "value": np.float64(0.5)}, tmp_path / "x.tar")
    (tmp_path / "bad.tar").write_bytes(b"PK")
    earlier = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        assert checkpoint.load(tmp_path / "x.tar").content["value"] == 0.5
        message(checkpoint.load, tmp_path / "bad.tar")
        assert set(torch.serialization.get_safe_globals()) == {*earlier, argparse.Namespace}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(earlier)
    with pytest.raises(pickle.UnpicklingError, match="scalar"):
        torch.load(tmp_path / "x.tar", weights_only=True)


def test_several_state_dicts_are_named_and_one_is_chosen(tmp_path):
    path, zeros = tmp_path / "x.tar", {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    torch.save({"model": zeros, "model_ema": WEIGHTS, "teacher": zeros, "epoch": 1}, path)
    assert f"{path}#model or {path}#model_ema" in message(checkpoint.load, path)
    assert equal(loaded(f"{path}#model_ema"))
    assert not equal(loaded(f"{path}#teacher"))
    assert f"no state_dict ema: choose one as {path}#model or" in message(checkpoint.load, f"{path}#ema")
    one, other = (checkpoint.load(f"{path}#{key}").source for key in ("model", "model_ema"))
    assert one == {"path": str(path), "sha256": files.sha256(path), "key": "model"}
    assert checkpoint.weights_id(one) != checkpoint.weights_id(other)


def test_a_file_whose_name_holds_a_hash_sign_is_that_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.tar")
    torch.save({"model": WEIGHTS, "weights": WEIGHTS}, tmp_path / "x.tar#model")
    assert equal(loaded(f"{tmp_path}/x.tar#model"))
    assert equal(loaded(f"{tmp_path}/x.tar#model#weights"))
    assert f"{tmp_path}/y#1.tar does not exist" in message(checkpoint.load, f"{tmp_path}/y#1.tar")


def test_weights_under_an_unknown_key_are_named_with_that_key(tmp_path):
    torch.save({"epoch": 1, "weights": WEIGHTS}, tmp_path / "x.tar")
    assert f"no state_dict: choose one as {tmp_path / 'x.tar'}#weights" in message(checkpoint.load, tmp_path / "x.tar")
    torch.save({"epoch": 1, "accuracy": 2.0}, tmp_path / "x.tar")
    assert "keys: epoch, accuracy" in message(checkpoint.load, tmp_path / "x.tar")


@pytest.mark.parametrize("content, kind", [
    (lambda: net(), "a whole module (model.net.Net"),
    (lambda: {"epoch": 1, "model": net()}, "keys: epoch, model"),
    (lambda: {"args": argparse.Namespace(lr=1), "model": WEIGHTS}, "argparse.Namespace; keys: args, model"),
], ids=["module", "module under a key", "arguments beside weights"])
@pytest.mark.parametrize("write", [
    torch.save, lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
], ids=["torch.save", "torch.save of old", "pickle"])
def test_a_pickle_of_objects_names_them_and_the_command_that_saves_its_weights(tmp_path, content, kind, write):
    write(content(), tmp_path / "it's.tar")
    assert_converts(message(checkpoint.load, tmp_path / "it's.tar"), kind, tmp_path / "it's.tar.weights")


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript, but many files exist
def test_torchscript_names_the_command_that_saves_its_weights(tmp_path):
    torch.jit.save(torch.jit.trace(net().eval(), torch.zeros(1, 3, 32, 32)), tmp_path / "x.tar")
    assert_converts(message(checkpoint.load, tmp_path / "x.tar"), "TorchScript", tmp_path / "x.tar.weights")


def assert_converts(text, kind, result):
    """The message names the kind of file, and its command writes weights that load."""
    assert kind in text
    python, option, code = shlex.split(text[text.index("`") + 1:text.rindex("`")])
    assert (python, option) == ("python", "-c")
    exec(code)
    assert loaded(result).keys() == WEIGHTS.keys()


@pytest.mark.parametrize("data, words", [
    (b"<!DOCTYPE html><html>404 Not Found</html>", "an HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "lfs pull"),
    (b"AccessDenied", "a text file that begins with 'AccessDenied'"),
    (b"\x1f\x8b\x08\x00", "gunzip"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
])
def test_a_file_of_another_kind_is_named(tmp_path, data, words):
    (tmp_path / "x.tar").write_bytes(data)
    assert words in message(checkpoint.load, tmp_path / "x.tar")


def test_a_tar_archive_is_named(tmp_path):
    torch.save(WEIGHTS, tmp_path / "weights.pt")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "weights.pt", "weights.pt")
    assert "tar -xf" in message(checkpoint.load, tmp_path / "x.tar")


def test_quantized_weights_are_not_taken_for_numbers(tmp_path):
    text = mismatch(tmp_path, {**WEIGHTS, "conv1.weight": WEIGHTS["conv1.weight"].to(torch.int8)}, net())
    assert "conv1.weight is a tensor of torch.int8" in text


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


def test_the_malicious_pickle_of_these_tests_works(tmp_path):
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


@pytest.mark.parametrize("data", [b"", b"\x80\x02junk", b"PK\x03\x04junk"])
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
    assert "conv1.weight has shape (4, 3, 3, 3) in the file and (8, 3, 3, 3) in the network" in text


def test_another_class_count_is_named(tmp_path):
    text = mismatch(tmp_path, net(num_classes=100).state_dict(), net())
    assert "the file has 100 classes, the data set has 10" in text


def test_missing_and_unexpected_entries_are_named(tmp_path):
    fewer = {name: tensor for name, tensor in WEIGHTS.items() if name != "bn2.bias"}
    assert "no bn2.bias (shape (8,))" in mismatch(tmp_path, fewer, net())
    assert "extra (shape (1,))" in mismatch(tmp_path, {**WEIGHTS, "extra": torch.ones(1)}, net())


def test_the_checkpoint_knows_the_hash_of_what_it_read(tmp_path):
    import hashlib
    torch.save({"state_dict": WEIGHTS}, tmp_path / "x.tar")
    expected = hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest()
    assert checkpoint.load(tmp_path / "x.tar").source == {"path": str(tmp_path / "x.tar"), "sha256": expected}


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
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


def test_best_and_last_model_of_one_epoch_are_two_files(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    with open(directory / "best_model.tar", "r+b") as file:
        file.truncate(10)
    assert checkpoint.load(directory / "last_model.tar").content["epoch"] == 1


def test_a_network_without_a_classifier_of_its_own_still_loads(tmp_path):
    """A user's network whose parameters are all vectors."""
    network = nn.BatchNorm2d(3)
    torch.save(network.state_dict(), tmp_path / "x.tar")
    checkpoint.load_weights(nn.BatchNorm2d(3), checkpoint.load(tmp_path / "x.tar"))
    torch.save(nn.BatchNorm2d(4).state_dict(), tmp_path / "x.tar")
    assert "weight" in message(checkpoint.load_weights, network, checkpoint.load(tmp_path / "x.tar"))
