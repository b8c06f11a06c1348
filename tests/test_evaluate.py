"""evaluate.py: metrics equal those of the runs and values computed by hand."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import results
from safetensors.torch import save_file

from evaluate import evaluate
from model import build_model
from utils.cli import main
from utils.quality import agreement, foreign_auroc, profile, quality, similarity


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run(checkpoint, ...)` calls evaluate.py in this process: exit status, stdout, stderr, and content of --json."""
    def evaluated(*arguments):
        file = tmp_path / "evaluated.json"
        file.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", "--data_dir", str(tmp_path / "data"),
                                          "--json", str(file), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(evaluate)
        captured = capsys.readouterr()
        content = json.loads(file.read_text()) if file.exists() else None
        return SimpleNamespace(returncode=end.value.code, stdout=captured.out, stderr=captured.err, json=content)
    return evaluated


@pytest.fixture
def row(run):
    """`row(checkpoint, ...)`: metrics of the first checkpoint."""
    def first(checkpoint, *arguments):
        done = run(checkpoint, *arguments)
        assert done.returncode == 0, done.stderr
        return done.json["checkpoints"][str(checkpoint)]
    return first


def refused(run, *arguments):
    """The error line of a refused call."""
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.json) == (2, "", None), done.stdout + done.stderr
    line, = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def weights(tmp_path):
    """A bare state dict of a `net` with 4 channels for 3 classes."""
    path = tmp_path / "weights.pt"
    torch.manual_seed(3)
    torch.save(build_model("net", 3, num_channels=4).state_dict(), path)
    return path


@pytest.fixture
def options(data):
    """Options that describe the network and data set of `weights`."""
    return ["--model", "net", "--num_channels", "4", "--dataset", f"folder:{data}"]


@pytest.fixture
def trained(call, experiment):
    """`trained(name, stage, **params)`: a finished run of three epochs."""
    def finished(name="run", stage="train_scratch", **params):
        directory = experiment(name, **{"num_epochs": 3, **params})
        done = call(stage, directory)
        assert done.returncode == 0, done.stderr
        return directory
    return finished


def test_the_calibration_error_of_four_images_is_known():
    """15 bins: 0.9 and 0.92 lie in (13/15, 14/15], 0.6 and 0.65 in (9/15, 10/15]; |mean confidence - accuracy|."""
    probabilities = torch.tensor([[0.9, 0.1], [0.92, 0.08], [0.605, 0.395], [0.35, 0.65]])
    found = quality(probabilities.log(), torch.tensor([0, 1, 0, 1]))
    assert found["calibration_error"] == pytest.approx(100 * (0.5 * (0.91 - 0.5) + 0.5 * (1 - 0.6275)), rel=1e-4)
    assert found["accuracy"] == 75
    assert found["cross_entropy"] == pytest.approx(-sum(map(math.log, (0.9, 0.08, 0.605, 0.65))) / 4, rel=1e-5)


def test_uniform_logits_have_the_entropy_log_c_and_no_calibration_error():
    found = quality(torch.full((70, 7), 2.5), torch.arange(70) % 7)
    assert found["entropy"] == pytest.approx(math.log(7), rel=1e-6)
    assert found["cross_entropy"] == pytest.approx(math.log(7), rel=1e-6)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-4)


def test_agreement_and_kl_of_two_images_are_known():
    reference, network = torch.tensor([[0.8, 0.2], [1.0, 0.0]]), torch.tensor([[0.4, 0.6], [0.5, 0.5]])
    floor = 1e-6 / (1 + 1e-6)
    expected = [0.8 * math.log(2) + 0.2 * math.log(1 / 3),
                (1 - floor) * math.log(2 * (1 - floor)) + floor * math.log(2 * floor)]
    found = agreement(network.log(), reference.log())
    assert found == {"agreement": 50.0, "kl": pytest.approx(sum(expected) / 2, rel=1e-5)}
    found = agreement(reference.log(), network.log())
    assert found["kl"] == pytest.approx((0.4 * math.log(0.5) + 0.6 * math.log(3) +
                                         0.5 * math.log(0.5 / floor) + 0.5 * math.log(0.5)) / 2, rel=1e-5)


def test_the_risk_coverage_area_of_four_images_is_known():
    """From the most to the least confident: right, wrong, right, wrong; error rates 0, 1/2, 1/3, 1/2."""
    answers = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]]).log()
    found = quality(answers, torch.tensor([0, 0, 0, 1]))
    assert found["risk_coverage_area"] == pytest.approx(100 * (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_answers_that_only_depend_on_the_class_have_a_known_profile():
    p = torch.tensor([[0.7, 0.25, 0.05]] * 2 + [[0.1, 0.1, 0.8]])
    found = profile(p.log(), torch.tensor([0, 0, 2]))
    assert found["cmi"] == pytest.approx(0, abs=1e-6)
    assert found["non_target_mass"] == pytest.approx(100 * (0.3 + 0.3 + 0.2) / 3, rel=1e-5)
    assert found["peaks"] == pytest.approx((2 + 2 + 3) / 3)
    kl = [sum(x * math.log(x / y) for x, y in zip(*pair, strict=True))
          for pair in ((p[0].tolist(), p[2].tolist()), (p[2].tolist(), p[0].tolist()))]
    assert found["separation"] == pytest.approx(sum(kl) / 2, rel=1e-5)


def test_cmi_is_the_mean_divergence_from_the_mean_answer_of_the_class():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    expected = (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3)
                + 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)) / 2
    assert profile(p.log(), torch.tensor([0, 0]))["cmi"] == pytest.approx(expected, rel=1e-5)


def test_foreign_auroc_separates_images_by_confidence():
    known, foreign = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).log(), torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    assert foreign_auroc(known, foreign) == pytest.approx(75)


def test_rank_correlation_covers_classes_below_the_top_and_ties_share_a_rank():
    reference = torch.tensor([[0.6, 0.2, 0.15, 0.05], [0.6, 0.3, 0.05, 0.05]]).log()
    network = torch.tensor([[0.5, 0.1, 0.15, 0.25], [0.4, 0.3, 0.2, 0.1]]).log()
    found = similarity(network, reference)
    assert found["rank_correlation"] == pytest.approx((-1 + math.sqrt(3) / 2) / 2)
    assert found["l1_change"] == pytest.approx((0.4 + 0.4) / 2, rel=1e-5)


def test_an_answer_defense_has_its_price_and_foreign_images_are_counted(row, weights, options, data):
    plain = row(weights, *options, "--foreign", f"folder:{data}")
    stingy = row(weights, *options, "--foreign", f"folder:{data}", "--answer_defense", "stingy:1")
    assert 0 < stingy["defense_l1_change"] < 2 and "defense_l1_change" not in plain
    assert stingy["accuracy"] == plain["accuracy"] and stingy["foreign_auroc"] == 50  # every answer is as confident
    assert stingy["entropy"] < plain["entropy"] and stingy["peaks"] == 1


def test_accuracy_and_loss_are_those_of_the_run_at_its_last_and_its_best_epoch(trained, row):
    directory = trained(learning_rate=0.02, num_epochs=4)
    for arguments, epoch in (((), "last"), (("--best",), "best")):
        found, expected = row(directory, *arguments), results(directory)[epoch]
        assert found["accuracy"] == expected["test_accuracy"]
        assert found["cross_entropy"] == pytest.approx(expected["test_loss"], rel=1e-6)
    assert row(directory / "best_model.tar")["accuracy"] == results(directory)["best"]["test_accuracy"]
    assert row(directory / "best_model.tar")["path"] == str(directory / "best_model.tar")


def test_each_network_gets_the_images_of_its_own_run(trained, run):
    """Each checkpoint keeps its own mean, std, image size and background when evaluated with others."""
    runs = [trained("one", mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5]), trained("two", background="black"),
            trained("three", model_name="resnet18", num_epochs=1, image_size=16)]
    done = run(*runs, "--against", runs[1])
    assert done.returncode == 0, done.stderr
    found = [done.json["checkpoints"][str(each)] for each in runs]
    assert [each["accuracy"] for each in found] == [results(each)["last"]["test_accuracy"] for each in runs]
    assert [each["cross_entropy"] for each in found] == [
        pytest.approx(results(each)["last"]["test_loss"], rel=1e-5) for each in runs]
    assert (found[1]["agreement"], found[1]["kl"]) == (100, 0)
    assert found[0]["kl"] > 0 and found[2]["kl"] > 0
    assert "the trigger 'badnet_sq' is made for images of 32x32" in refused(run, runs[2], "--trigger", "badnet_sq")


def test_transparent_images_show_the_background_of_the_run(trained, row, tmp_path):
    from PIL import Image
    for part in ("train", "test"):
        for label, level in enumerate((40, 200)):
            folder = tmp_path / "glass" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(6):
                picture = Image.new("RGBA", (32, 32), (level, 3 * number, 0, 255))
                picture.paste((0, 0, 0, 0), (0, 0, 32, 20))
                picture.save(folder / f"{number}.png")
    found = {background: trained(background, dataset=f"folder:{tmp_path / 'glass'}", background=background)
             for background in ("white", "black")}
    for directory in found.values():
        assert row(directory)["cross_entropy"] == pytest.approx(results(directory)["last"]["test_loss"], rel=1e-6)
    other = row(found["white"], "--background", "black")["cross_entropy"]
    assert other != pytest.approx(results(found["white"])["last"]["test_loss"], rel=1e-3)


def test_a_backdoor_has_the_rates_of_the_run(trained, row):
    directory = trained(stage="train_poisoned", trigger="badnet_sq", target=1, poison_rate=0.5)
    found, expected = row(directory, "--trigger", "badnet_sq", "--target", "1"), results(directory)["last"]
    rates = "asr", "triggered_accuracy", "base_rate", "target_recall"
    assert {key: found[key] for key in rates} == {key: expected[key] for key in rates}
    assert not {"agreement", "kl"} & found.keys()


def test_a_bare_state_dict_and_safetensors_are_evaluated_alike(row, run, weights, options, tmp_path):
    save_file(torch.load(weights), tmp_path / "weights.safetensors")
    torch.save({"model": torch.load(weights), "model_ema": torch.load(weights)}, tmp_path / "several.pt")
    found = row(weights, *options)
    for name in (tmp_path / "weights.safetensors", f"{tmp_path}/several.pt#model_ema"):
        other = row(name, *options, "--against", weights)
        assert other["kl"] == 0 and other["agreement"] == 100
        assert all(other[key] == found[key] for key in ("accuracy", "cross_entropy", "calibration_error", "entropy"))
    assert other["key"] == "model_ema"
    line = refused(run, tmp_path / "several.pt", *options)
    assert "several.pt#model" in line and "several.pt#model_ema" in line


def test_json_and_table_describe_the_evaluation(run, weights, options, data):
    done = run(weights, *options, "--interface", "probabilities", "--trigger", "badnet_sq", "--against", weights)
    content = done.json
    assert (content["dataset"], content["images"]) == (f"folder:{data}", 15)
    assert (content["interface"], content["answer_defense"]) == ("probabilities", "none")
    assert (content["trigger"], content["target"]) == ("badnet_sq", 0)
    found = content["checkpoints"][str(weights)]
    assert content["against"] == {key: found[key] for key in ("path", "sha256")}
    first, *tables = done.stdout.splitlines()
    assert first == f"folder:{data}: 15 test images of 32x32 pixels"
    columns = {}
    for heads, numbers in (tables[:3:2], tables[4::2]):  # for users, and for students
        columns |= zip([text.strip() for text in heads.split("|")], [text.strip() for text in numbers.split("|")],
                       strict=True)
    assert columns["checkpoint"] == str(weights)
    assert columns["accuracy"] == f"{found['accuracy']:.2f}" and columns["KL"] == "0.000"
    assert columns["entropy"] == f"{found['entropy']:.3f}" and columns["ASR"] == f"{found['asr']:.2f}"


def test_probabilities_have_the_metrics_of_logits(row, weights, options):
    logits, probabilities = (row(weights, *options, "--interface", name) for name in ("logits", "probabilities"))
    assert {key: pytest.approx(value, rel=1e-5) for key, value in logits.items() if isinstance(value, float)} == {
        key: value for key, value in probabilities.items() if isinstance(value, float)}


def test_recorded_classes_are_compared_with_those_of_the_data(trained, run, data, tmp_path):
    """Another order of classes is an error, other names are a warning, as in the stages."""
    directory = trained()
    for name, folders in (("order", {"blue": "blue", "green": "red", "red": "green"}),
                          ("names", {"blue": "a", "green": "b", "red": "c"})):
        for part in ("train", "test"):
            for old, new in folders.items():
                (tmp_path / name / part).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / part / new).symlink_to(data / part / old)
    done = run(directory, "--dataset", f"folder:{tmp_path / 'names'}")
    assert f"remark: {directory}: trained on classes with other names (its class 0 is 'blue', here 'a')" in done.stdout
    content = torch.load(directory / "last_model.tar")
    content["data"]["classes"] = ["red", "green", "blue"]
    torch.save(content, directory / "last_model.tar")
    line = refused(run, directory)
    assert "trained on the same classes in another order (its class 0 is 'red', here 'blue')" in line


NETWORK = """
import torch
def build(num_classes):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, num_classes))
"""


def test_a_checkpoint_does_not_import_code(trained, run, tmp_path, monkeypatch):
    """Names in params.json and --model are trusted; names in a checkpoint are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_average.py").write_text(NETWORK)
    directory = trained(model_name="my_average:build")
    done = run(directory)
    assert done.returncode == 0 and "my_average:build was imported from my_average (" in done.stdout
    assert "names code to import, my_average:build" in refused(run, directory / "last_model.tar")
    assert run(directory / "last_model.tar", "--model", "my_average:build").returncode == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["--trigger", "badnet"], "unknown trigger 'badnet' (did you mean 'badnet_sq'?)"),
    (["--trigger", "badnet_sq", "--target", "3"], "--target 3: folder:"),
    (["--trigger", "badnet_sq", "--target", "-1"], "--target -1: folder:"),
    (["--image_size", "40"], "net takes 3x32x32 images, got 3x40x40"),
    (["--interface", "words"], "\"interface\": unknown interface 'words'"),
    (["--interface", "logits:3"], "\"interface\": interface 'logits:3': takes no strength"),
    (["--answer_defense", "wall"], "\"answer_defense\": unknown answer defense 'wall'"),
    (["--model", "resnet99"], "unknown model 'resnet99'"),
    (["--model", "timm:no_such_net"], "timm"),
    (["--model", "no_such_module:build"], "module 'no_such_module' is neither installed nor in"),
    (["--num_channels", "5"], "does not fit: conv1.weight has shape"),
    (["--model_options", "{'a': 1}"], "is not a JSON object"),
    (["--model_options", '{"depth": 1}'], "net takes no keyword argument 'depth'"),
    (["--std", "0", "0", "0"], '"std"'),
    (["--image_size", "4"], '"image_size" is 4'),
    (["--dataset", "cifar11"], "unknown data set 'cifar11' (did you mean 'cifar10'?)"),
    (["--dataset", "demo"], "the file has 3 classes, the data set has 10"),
    (["--against", "nowhere.pt"], "checkpoint: nowhere.pt does not exist"),
    (["--device", "tpu"], "--device tpu"),
])
def test_invalid_arguments_are_one_line(run, weights, options, arguments, words):
    assert words in refused(run, weights, *options, *arguments)


def test_a_file_without_model_and_data_set_is_refused(run, weights, options):
    line = refused(run, weights)
    assert line == f"error: {weights} has no record of its network and data: give --model and --dataset"
    assert refused(run, weights, *options[:2]).endswith("give --dataset")
    assert refused(run, weights, *options[2:]).endswith("give --model")


def test_checkpoints_of_several_data_sets_are_refused(trained, run, weights, options, data):
    directory = trained("demo", dataset="demo", subset_fraction=0.01, num_epochs=1)
    line = refused(run, directory, trained())
    assert line == f"error: the checkpoints are of several data sets, demo and folder:{data}: choose one with --dataset"


def test_outputs_that_are_not_finite_are_refused(run, weights, options):
    content = torch.load(weights)
    content["fc2.bias"][0] = float("nan")
    torch.save(content, weights)
    assert "the outputs of the network are not finite" in refused(run, weights, *options)


def test_bare_reference_weights_use_the_first_network_and_its_constants(row, trained, tmp_path):
    directory = trained(num_epochs=1, mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5])
    bare = tmp_path / "bare.safetensors"
    state_dict = torch.load(directory / "last_model.tar")["state_dict"]
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, bare)
    found = row(directory, "--against", bare)
    assert found["agreement"] == 100
    assert found["kl"] == pytest.approx(0, abs=1e-6)
