"""Cached logits of a frozen network equal the computed ones."""
import dataclasses
import os

import pytest
import torch
from conftest import contents, results
from test_step import batches, network
from torch import nn

from utils.evaluation import Frozen
from utils.teacher_cache import TeacherCache


def cache(directory, seed=1, sha256="a", said=None, dtype=torch.float32):
    frozen = Frozen(network(seed))
    said = [] if said is None else said
    frozen.prepare(sha256, 5, batches(), dtype, directory, said.append)
    return frozen, frozen._cache


def count_rows(monkeypatch):
    """Positions in the file at which rows are written."""
    places, write = [], os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, content, place: places.append(place) or write(file, content, place))
    return places


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_cached_logits_equal_computed_logits(tmp_path, dtype, tolerance):
    frozen, table = cache(tmp_path, dtype=dtype)
    for epoch in range(3):
        table.start_epoch(epoch)
        for batch in batches().epoch(epoch):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                expected = frozen.network(batch.images).to(dtype).float()
                torch.testing.assert_close(frozen(batch), expected, rtol=tolerance, atol=tolerance)


def test_each_view_is_computed_once_for_all_runs(tmp_path, monkeypatch):
    written = count_rows(monkeypatch)
    frozen, table = cache(tmp_path)
    for epoch in range(4):
        table.start_epoch(epoch)
    views = {(int(i), int(v)) for epoch in range(4) for draw in batches().draws(epoch, torch.device("cpu"))
             for i, v in zip(draw["index"], batches().view(draw), strict=True)}
    assert len(written) == len(set(written)) == len(views)
    again, table = cache(tmp_path)
    again.network.forward = None  # the network is not called
    for epoch in range(4):
        table.start_epoch(epoch)
    assert torch.equal(again._cache.logits, frozen._cache.logits)


def test_cached_logits_do_not_depend_on_earlier_requests(tmp_path):
    frozen, table = cache(tmp_path / "all")
    table.start_epoch(0)
    other, table = cache(tmp_path / "some")
    half = slice(0, 37)
    draw = {name: values[half] for name, values in batches().draws(0, torch.device("cpu"))[0].items()
            if name != "epoch"}
    rows = draw["index"] * table.batches.views + table.batches.view(draw)
    table._write(rows, table._compute(draw))
    table.start_epoch(0)
    assert torch.equal(other._cache.logits, frozen._cache.logits)


def test_a_run_continues_without_a_cache_directory(tmp_path):
    (tmp_path / "cache").write_text("a file")
    said = []
    frozen, table = cache(tmp_path / "cache", said=said)
    table.start_epoch(0)
    expected, table = cache(tmp_path / "other")
    table.start_epoch(0)
    assert torch.equal(frozen._cache.logits, expected._cache.logits)
    assert "cannot be written (File exists)" in said[0]


def test_logits_of_zero_are_cached_too(tmp_path, monkeypatch):
    frozen, table = cache(tmp_path)
    monkeypatch.setattr(frozen.network, "forward", lambda images: torch.zeros(len(images), 5))
    table.start_epoch(0)
    monkeypatch.setattr(frozen.network, "forward", None)
    table.start_epoch(0)
    assert not frozen._cache.logits.any()


def test_another_network_has_its_own_cache(tmp_path):
    first, table = cache(tmp_path, seed=1, sha256="a")
    table.start_epoch(0)
    other, table = cache(tmp_path, seed=2, sha256="b")
    table.start_epoch(0)
    assert not torch.allclose(first._cache.logits, other._cache.logits)
    assert len(contents(tmp_path)) == 2


class Scaled(nn.Module):
    """Logits of a network times a factor that is in neither its weights nor its repr."""

    def __init__(self, factor):
        super().__init__()
        self.network, self.factor = network(1), factor

    def forward(self, images):
        return self.network(images) * self.factor

    def __repr__(self):
        return repr(self.network)


def test_another_forward_with_equal_weights_has_its_own_cache(tmp_path):
    tables, said = [], []
    for factor in (1, 2, 1 + 1e-5, 2):
        tables.append(TeacherCache(Scaled(factor).eval(), "a", 5, batches(), torch.float32, tmp_path, said.append))
        tables[-1].start_epoch(0)
    torch.testing.assert_close(tables[1].logits, tables[0].logits * 2)
    assert tables[2].path == tables[0].path != tables[1].path == tables[3].path
    assert ["is not used" in line for line in said] == [False, True, False, False, True, False]
    assert ["has 100 of" in line for line in said] == [False, False, False, True, False, True]


def test_a_cache_with_a_damaged_probe_is_refilled(tmp_path):
    _, table = cache(tmp_path)
    table.start_epoch(0)
    content = table.path.read_bytes()
    table.path.write_bytes(content[:-1])
    said = []
    _, table = cache(tmp_path, said=said)
    table.start_epoch(0)
    assert "has 0 of the 100" in said[0] and table.path.read_bytes() == content


def test_a_partly_written_row_is_computed_again(tmp_path, monkeypatch):
    frozen, table = cache(tmp_path)
    table.start_epoch(0)
    content = bytearray(table.path.read_bytes())
    row = next(i for i in range(0, len(content), 24) if any(content[i:i + 24]))
    content[row + 12:row + 20] = bytes(8)
    table.path.write_bytes(content)
    written = count_rows(monkeypatch)
    again, table = cache(tmp_path)
    table.start_epoch(0)
    assert written == [row]
    assert torch.equal(again._cache.logits, frozen._cache.logits)


def test_a_run_continues_after_losing_its_cache(tmp_path):
    said = []
    frozen, table = cache(tmp_path, said=said)
    table.start_epoch(0)
    table.path.unlink()
    table.start_epoch(1)
    table.start_epoch(2)
    told, line = said
    assert "has 0 of the 100 logits of epoch 1" in told
    assert "No such file" in line
    expected, table = cache(tmp_path / "other")
    table.start_epoch(2)
    assert torch.equal(frozen._cache.logits, expected._cache.logits)


def test_a_run_continues_without_a_cache_on_a_full_disk(tmp_path, monkeypatch):
    said = []
    frozen, table = cache(tmp_path, said=said)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.pwrite", full)
    table.start_epoch(0)
    table.start_epoch(1)
    told, line = said
    assert "has 0 of the 100 logits of epoch 1" in told
    assert "No space left on device" in line
    batch = next(batches().epoch(1))
    assert torch.allclose(frozen(batch), frozen.network(batch.images), atol=1e-5)


@pytest.mark.parametrize("script", ["train_kd", "train_nasty"])
def test_a_run_with_cached_answers_equals_the_run_without(call, experiment, script):
    normal = experiment("normal", num_epochs=1)
    assert call("train_scratch", normal).returncode == 0
    role = {"train_kd": {"teacher_model": "net", "teacher_num_channels": 4, "alpha": 0.9,
                         "teacher_resume": str(normal / "best_model.tar")},
            "train_nasty": {"adversarial_model": "net", "adversarial_num_channels": 4, "weight": 0.1,
                            "adversarial_resume": str(normal / "best_model.tar")}}[script]
    rows = []
    for name, switch in (("plain", 0), ("remembered", 1), ("again", 1)):
        directory = experiment(name, **role, temperature=4, teacher_cache=switch, num_epochs=3)
        assert call(script, directory).returncode == 0
        rows.append(results(directory)["last"])
    assert rows[1] == pytest.approx(rows[0], rel=1e-2)
    assert rows[2] == rows[1]


def test_rotations_are_unbounded_and_not_cached(call, experiment, monkeypatch):
    from utils import run as module
    load = module.load_dataset
    monkeypatch.setattr(module, "load_dataset", lambda *a, **k: dataclasses.replace(
        load(*a, **k), augmentation="rotate_flip"))
    normal = experiment("normal", num_epochs=1)
    assert call("train_scratch", normal).returncode == 0
    directory = experiment("student", teacher_model="net", teacher_num_channels=4, alpha=0.9, temperature=4,
                           teacher_resume=str(normal / "best_model.tar"), teacher_cache=1, num_epochs=1)
    done = call("train_kd", directory)
    assert done.returncode == 0
    assert "teacher_cache: not used, rotate_flip" in done.stdout
