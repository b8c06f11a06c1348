"""Threat model of a thief: interfaces, labels, foreign images, and number of queries."""
import dataclasses
import json

import pytest
import torch
from conftest import refused, results
from PIL import Image
from torch import nn

from attacks import build_attack
from defenses.answers import Answers, build_interface
from runs.stages import KD, recorded_params
from utils import checkpoint
from utils import run as run_module
from utils.data import Batch, Images, TrainBatches, _draw_subset
from utils.datasets import load_dataset, with_transfer_set
from utils.evaluation import Frozen, Queries
from utils.image_folder import Decoding

CLASSES = 4


def probabilities(*rows):
    return torch.tensor(rows)


class TestInterfaces:
    def test_top_k_keeps_the_largest_values_and_the_lowest_index_of_a_tie(self):
        answers = build_interface("top_k:2")(probabilities([0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]))
        torch.testing.assert_close(answers, probabilities([0.625, 0.0, 0.375, 0.0], [0.5, 0.5, 0.0, 0.0]))

    def test_top_k_of_more_than_all_classes_keeps_all(self):
        answers = probabilities([0.5, 0.1, 0.3, 0.1])
        torch.testing.assert_close(build_interface("top_k:9")(answers), answers)

    def test_rounding_renormalizes(self):
        answers = build_interface("round:1")(probabilities([0.86, 0.12, 0.02, 0.0]))
        torch.testing.assert_close(answers, probabilities([0.9, 0.1, 0.0, 0.0]))

    def test_a_row_that_is_rounded_to_zeros_becomes_its_top_class(self):
        answers = build_interface("round:0")(probabilities([0.3, 0.4, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]))
        assert answers.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]

    def test_a_label_is_one_hot_at_the_lowest_index_of_a_tie(self):
        answers = build_interface("label")(probabilities([0.1, 0.4, 0.4, 0.1]))
        assert answers.tolist() == [[0, 1, 0, 0]]

    @pytest.mark.parametrize("name", ["top_k", "top_k:0", "top_k:two", "round:-1", "label:1", "logits:2"])
    def test_a_strength_out_of_range_is_refused(self, name):
        with pytest.raises(ValueError, match=name.split(":")[0]):
            build_interface(name)

    @pytest.mark.parametrize("name", ["kd", "dkd"])
    def test_probabilities_and_logits_train_equal_students(self, name):
        torch.manual_seed(0)
        student, logits = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), 5 * torch.randn(6, CLASSES)
        batch = Batch(torch.randn(6, 3, 2, 2), torch.arange(6) % CLASSES, torch.arange(6), torch.tensor(30.0))
        losses = [build_attack(name, CLASSES)(student, batch, answers)["loss"]
                  for answers in (logits, Answers("probabilities", "none")(logits))]
        torch.testing.assert_close(*losses)


class TestQueries:
    @pytest.fixture
    def part(self):
        pixels = torch.randint(256, (9, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
        return Images(pixels, torch.arange(9) % CLASSES, torch.zeros(3), torch.ones(3))

    @pytest.fixture
    def teacher(self):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
        network.seen = 0

        def count(module, arguments):
            module.seen += len(arguments[0])
        network.register_forward_pre_hook(count)
        return network

    def prepared(self, part, teacher, queries):
        batches = TrainBatches(part, 4, "crop_flip", seed=3)
        frozen = Frozen(teacher, None, queries)
        frozen.prepare("", CLASSES, batches, torch.float32, None, print)
        return batches, frozen

    def test_once_queries_each_image_before_the_first_epoch_only(self, part, teacher):
        batches, frozen = self.prepared(part, teacher, Queries(once=True))
        frozen.start_epoch(0)
        seen, expected = teacher.seen, teacher(part.images.permute(0, 3, 1, 2).float() / 255)
        for epoch in (0, 1):
            frozen.start_epoch(epoch)
            for batch in batches.epoch(epoch):
                torch.testing.assert_close(frozen(batch), expected[batch.index])
        assert seen and teacher.seen == seen + 9  # those of `expected`

    def test_images_left_out_of_an_epoch_are_queried_too(self, part, teacher):
        batches, frozen = self.prepared(part, teacher, Queries(once=True))
        assert batches.usable == 8
        frozen.start_epoch(5)
        assert (frozen._table != 0).all()

    def test_the_answers_to_several_views_are_averaged_as_probabilities(self, part, teacher):
        batches, frozen = self.prepared(part, teacher, Queries(once=True, views=3))
        frozen.start_epoch(0)
        mean = torch.zeros(9, CLASSES)
        for epoch in range(3):
            draw = batches.full_draw(epoch)
            views = batches.gather({**draw, "epoch": torch.tensor(0.0)})
            mean[views.index] += teacher(views.images).softmax(1).detach() / 3
        torch.testing.assert_close(frozen._table.exp(), mean)

    def test_each_epoch_queries_other_views(self, part, teacher):
        _, frozen = self.prepared(part, teacher, Queries(views=2))
        frozen.start_epoch(0)
        first = frozen._table.clone()
        frozen.start_epoch(1)
        assert not torch.equal(first, frozen._table)

    @pytest.mark.parametrize(("queries", "number"), [(Queries(), 40), (Queries(once=True), 9),
                                                     (Queries(views=3), 135), (Queries(once=True, views=3), 27)])
    def test_are_counted(self, queries, number):
        assert queries.count(9, 8, 5) == number


class TestImages:
    def test_smaller_budgets_are_subsets_of_larger_ones(self):
        draws = [set(_draw_subset(torch.arange(100), size, 100).tolist()) for size in (5, 20, 60)]
        assert draws[0] < draws[1] < draws[2]

    def test_a_transfer_set_replaces_the_training_images_resized(self, data, tmp_path):
        folder = tmp_path / "foreign" / "deep"
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20), (10, 200, 30)).save(folder / "one.png")
        own = load_dataset(f"folder:{data}", tmp_path)
        foreign = with_transfer_set(own, f"folder:{tmp_path / 'foreign'}", tmp_path)
        assert foreign.train_images.shape == (1, 32, 32, 3)
        assert foreign.train_images[0, 5, 5].tolist() == [10, 200, 30]
        assert torch.equal(foreign.test_images, own.test_images)
        assert foreign.mean == own.mean

    def test_a_transfer_set_is_resized_to_the_image_size_of_the_data_set(self, data, tmp_path):
        own = load_dataset(f"folder:{data}", tmp_path, Decoding(48))
        foreign = with_transfer_set(own, "demo", tmp_path)
        assert foreign.train_images.shape == (10_000, 48, 48, 3)
        assert foreign.train_images.dtype == torch.uint8

    @pytest.mark.parametrize("name", ["folder:", "folder:nowhere", "cifar"])
    def test_a_missing_transfer_set_is_refused(self, call, student, name):
        assert name in refused(call, "train_kd", student(transfer_set=name, alpha=1))


@pytest.fixture
def student(experiment, call):
    """Function that writes the params.json of a student of a trained teacher."""
    teacher = experiment("teacher")
    assert call("train_scratch", teacher).returncode == 0
    return lambda **params: experiment("student", **{
        "teacher_model": "net", "teacher_num_channels": 4, "teacher_resume": str(teacher / "last_model.tar"), **params})


class TestRuns:
    @pytest.mark.parametrize(("params", "number"), [
        ({}, 90), ({"queries": "once"}, 45), ({"queries": "once", "query_budget": 10}, 10),
        ({"query_budget": 10}, 20), ({"subset_size": 20, "query_budget": 12}, 24)])
    def test_results_count_the_queries(self, student, call, params, number):
        directory = student(**params)
        assert call("train_kd", directory).returncode == 0
        assert results(directory)["queries"] == {"teacher": number}
        assert f"queries: {number} images were sent to the teacher" in (directory / "training.log").read_text()

    def test_a_thief_without_labels_does_not_depend_on_them(self, student, call, monkeypatch):
        """DKD reads labels if there are any."""
        load, weights = run_module.load_dataset, {}
        for labels in (0, 1):
            for shift in (0, 1):
                def shifted(*arguments, shift=shift, **options):
                    dataset = load(*arguments, **options)
                    return dataclasses.replace(dataset, train_labels=(dataset.train_labels + shift) % 3)

                monkeypatch.setattr(run_module, "load_dataset", shifted)
                directory = student(attack="dkd", warmup_epochs=0, labels=labels, queries="once")
                assert call("train_kd", directory, "--restart").returncode == 0
                weights[labels, shift] = checkpoint.load(directory / "last_model.tar").state_dict["fc2.weight"]
        assert torch.equal(weights[0, 0], weights[0, 1])
        assert not torch.equal(weights[1, 0], weights[1, 1])

    def test_a_run_on_foreign_images_is_evaluated_on_the_test_images(self, student, call, data):
        directory = student(transfer_set=f"folder:{data / 'test'}", alpha=1, queries="once")
        assert call("train_kd", directory).returncode == 0
        assert results(directory)["data"]["images"] == {"test": 15, "train": 15}
        assert "cross_entropy" not in results(directory)["last"]
        assert "without labels" in (directory / "training.log").read_text()

    @pytest.mark.parametrize("params", [
        {"transfer_set": "demo", "alpha": 1}, {"attack": "uniform", "of": "htc", "of_parameters": {"alpha": 0.5}},
        {"attack": "averager", "labels": 0, "alpha": 1}, {"subset_size": 20, "query_budget": 10}])
    def test_recorded_parameters_are_valid(self, student, params):
        values = json.loads((student(**params) / "params.json").read_text())
        recorded = KD.params_of(values).model_validate(values).model_dump()
        assert recorded_params("train_kd.py", recorded).model_dump() == recorded

    @pytest.mark.parametrize(("params", "number"), [
        ({"attack": "smoothing"}, 3 * 2 * 45), ({"attack": "smoothing", "queries": "once"}, 3 * 45),
        ({"queries": "once", "teacher_cache": 1, "answer_defense": "mad:0.5", "interface": "top_k:2"}, 45),
        ({"queries": "once", "answer_defense": "modelguard_s:1"}, 45)])
    def test_every_way_to_query_runs_and_counts(self, student, call, params, number):
        directory = student(**params)
        assert call("train_kd", directory).returncode == 0
        assert results(directory)["queries"] == {"teacher": number}
        assert ("answers" in results(directory)["details"]) == ("answer_defense" in params)

    @pytest.mark.parametrize("attack", ["kd", "smoothing"])
    def test_queried_once_a_run_continues_bit_for_bit(self, student, call, attack):
        params = {"attack": attack, "queries": "once"}
        whole = student(**params, num_epochs=2)
        assert call("train_kd", whole).returncode == 0
        parts = whole.rename(whole.with_name("whole")), student(**params, num_epochs=1)
        assert call("train_kd", parts[1]).returncode == 0
        assert call("train_kd", parts[1], "--set", "num_epochs=2").returncode == 0
        rows = [(part / "metrics.csv").read_text() for part in parts]
        assert rows[0] == rows[1]

    @pytest.mark.parametrize(("params", "words"), [
        ({"labels": 0}, 'no labels, which the attack "kd" needs: "alpha" is 0.9'),
        ({"labels": 0, "attack": "uniform"}, 'in "of_parameters", "alpha" is 0.9'),
        ({"labels": 0, "attack": "swap", "alpha": 1}, 'which the attack "swap" needs: labels correct'),
        ({"labels": 0, "alpha": 1, "validation_fraction": 0.2}, "validation_fraction"),
        ({"attack": "uniform", "of": "hard_label"}, "picks the top class"),
        ({"query_budget": 46}, '"query_budget" is 46, but there are 45'),
        ({"transfer_set": "demo"}, 'no labels, which the attack "kd" needs'),
        ({"transfer_set": "demo", "alpha": 1, "validation_fraction": 0.1}, "validation_fraction"),
        ({"subset_size": 46}, '"subset_size" is 46, but'),
        ({"subset_size": 10, "subset_fraction": 0.5}, "both set the number"),
        ({"answer_defense": "modelguard_s:1"}, "depends on the order of the queries"),
        ({"attack": "smoothing", "augmentation": 0}, "averages 3 augmented views"),
        ({"interface": "top_k"}, "takes a whole number")])
    def test_contradicting_parameters_are_refused(self, student, call, params, words):
        assert words in refused(call, "train_kd", student(**params))
