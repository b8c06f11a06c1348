"""Validation of params.json, and its error messages."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import EXPERIMENTS, ROOT, environment, refused

import attacks
import defenses
from defenses.answers import ANSWER_DEFENSES, INTERFACES
from runs.parameters import markdown_table
from runs.stages import DATAFREE, KD, NASTY, POISONED, SCRATCH, stage_of
from utils.errors import UserError
from utils.params import MethodParams, Stage, changed_keys, load_params, parse_overrides
from utils.registry import Registry
from utils.resume import Start
from utils.run import image_size_warnings

VALUES = {"dataset": "demo", "model_name": "net", "learning_rate": 0.001, "num_epochs": 2}
KD_VALUES = {**VALUES, "teacher_model": "net", "teacher_resume": "x.tar", "temperature": 4, "alpha": 0.9}


def load(tmp_path, values, stage=SCRATCH, overrides=None):
    path = tmp_path / "params.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return load_params(path, stage, overrides)


def message(tmp_path, values, stage=SCRATCH, overrides=None):
    with pytest.raises(UserError) as error:
        load(tmp_path, values, stage, overrides)
    text = str(error.value)
    assert "\n" not in text
    assert ("--set" if overrides else str(tmp_path / "params.json")) in text
    return text


def test_defaults_are_the_published_recipe(tmp_path):
    params = load(tmp_path, VALUES)
    assert (params.batch_size, params.gamma, params.augmentation, params.seed) == (128, 0.1, True, 0)


def test_switches_are_0_and_1_or_false_and_true(tmp_path):
    assert load(tmp_path, {**VALUES, "augmentation": 0}).augmentation is False
    assert load(tmp_path, {**VALUES, "augmentation": True}).augmentation is True


def test_an_integer_is_a_fine_temperature_and_overrides_replace_values(tmp_path):
    params = load(tmp_path, KD_VALUES, KD, {"alpha": 0.5})
    assert (params.temperature, params.alpha) == (4.0, 0.5)


@pytest.mark.parametrize("key, value, words", [
    ("learning_rate", 0, ["greater than 0", "0"]),
    ("learning_rate", "fast", ["valid number", '"fast"']),
    ("batch_size", 128.5, ["integer", "128.5"]),
    ("batch_size", "128", ["integer", '"128"']),
    ("batch_size", True, ["integer", "true"]),
    ("batch_size", 1, ["greater than or equal to 2"]),
    ("num_epochs", 0, ["greater than or equal to 1"]),
    ("schedule", 80, ["list", "80"]),
    ("schedule", [80, -1], ['"schedule"[1]', "-1"]),
    ("dropout_rate", 1.0, ["less than 1"]),
    ("validation_fraction", 1, ["less than 1"]),
    ("precision", "fp16", ["'auto'", "'fp32'", "'bf16'"]),
    ("cuda", 2, ["boolean", "2"]),
    ("cuda", "yes", ["boolean", '"yes"']),
    ("augmentation", 2, ["'shift'", "0 or 1", "2"]),
    ("augmentation", "crop", ["'shift'", "0 or 1", '"crop"']),
    ("std", [0.2, 0.0, 0.2], ['"std"[1]', "greater than 0"]),
    ("mean", [0.5], ["at least 3 items"]),
    ("mean", [125.3, 123.0, 113.9], ["[125.3, 123.0, 113.9]", "pixels are in [0, 1]", "by 255"]),
    ("std", [63.0, 62.1, 66.7], ["pixels are in [0, 1]", "by 255"]),
    ("std", [0.0008, 0.0008, 0.0008], ["1/255", "twice"]),
    ("model_name", None, ["string", "null"]),
])
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(tmp_path, key, value, words):
    text = message(tmp_path, {**VALUES, key: value})
    assert all(word in text for word in [f'"{key}"', *words])


def test_constants_of_pixels_up_to_255_are_refused_on_the_command_line_too(tmp_path):
    text = message(tmp_path, VALUES, overrides=parse_overrides(["mean=[125.3,123,113.9]"]))
    assert '--set: "mean" is [125.3, 123, 113.9]: should be at most 1' in text


@pytest.mark.parametrize("mean, std", [
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),  # a network for pixels in [0, 1], not normalized
    ([0.4, 0.4, 0.4], [0.0039, 0.0039, 0.0039]),  # a network for pixels in [0, 255] minus the mean
    ([0.2, 0.3, 0.0], [0.2, 0.3, 0.0001]),  # constants of images without blue
    ([0.5, 0.5, 0.5], None)])
def test_constants_of_pixels_up_to_1_are_taken(tmp_path, mean, std):
    params = load(tmp_path, {**VALUES, "mean": mean, "std": std})
    assert (params.mean, params.std) == (mean, std)


def test_another_augmentation_is_a_change(tmp_path):
    params = load(tmp_path, VALUES, overrides=parse_overrides(["augmentation=shift"]))
    assert params.augmentation == "shift"
    assert changed_keys(VALUES, params) == ['augmentation (true -> "shift")']


def test_the_schema_for_editors_takes_the_switches_of_the_published_files():
    for name, values in EXPERIMENTS.items():
        schemas = of_experiment(values).model_json_schema()["properties"]
        assert all(value in schemas[key]["enum"] for key, value in values.items() if "enum" in schemas[key]), name
        assert {"cuda"} <= {key for key in schemas if "enum" in schemas[key]}


def test_infinity_and_nan_are_refused(tmp_path):
    assert '"learning_rate"' in message(tmp_path, {**VALUES, "learning_rate": float("inf")})
    assert '"learning_rate"' in message(tmp_path, {**VALUES, "learning_rate": float("nan")})


def test_all_wrong_values_are_named_at_once(tmp_path):
    text = message(tmp_path, {**VALUES, "learning_rate": -1, "gamma": 0})
    assert '"learning_rate"' in text
    assert '"gamma"' in text


def test_an_unknown_key_is_named_with_the_nearest_valid_one(tmp_path):
    text = message(tmp_path, {**VALUES, "leraning_rate": 0.1})
    assert 'unknown key "leraning_rate"' in text
    assert 'did you mean "learning_rate"' in text


def test_an_unknown_key_on_the_command_line_is_named_too(tmp_path):
    assert 'did you mean "num_epochs"' in message(tmp_path, VALUES, overrides={"num_epoch": 3})


def test_a_key_of_another_stage_names_that_stage(tmp_path):
    text = message(tmp_path, KD_VALUES)
    assert 'unknown key "teacher_model" (it is a key of train_kd.py and train_datafree.py)' in text


def test_a_missing_key_is_named(tmp_path):
    text = message(tmp_path, VALUES, NASTY)
    assert all(f'the key "{key}" is missing' in text for key in ("adversarial_model", "adversarial_resume"))


def test_invalid_json_is_named_with_its_line(tmp_path):
    text = message(tmp_path, '{\n  "dataset": "demo",\n  "model_name" "net"\n}')
    assert "line 3" in text


@pytest.mark.parametrize("text", ['{"a": 1,\n}', '{\n"a": [1,  ]}', '{\n"a": {"b": 1 , } }'])
def test_a_comma_before_a_closing_bracket_is_named(tmp_path, text):
    before = text.rpartition(",")[0]
    place = f"line {before.count(chr(10)) + 1}, column {len(before.rpartition(chr(10))[2]) + 1}"
    assert f"{place}: not valid JSON: remove this comma" in message(tmp_path, text)


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    assert '"gamma" appears twice' in message(tmp_path, '{"gamma": 0.1, "gamma": 0.2}')


@pytest.mark.parametrize("text, words", [
    ("[]", "expected a JSON object"), ("3", "expected a JSON object"), ("", "line 1, column 1: not valid JSON"),
    ("\x00", "not valid JSON"), ('{"dataset": "folder:/\\udce9"}', "half a surrogate pair"),
    pytest.param("[" * 100_000, "nested too deeply", id="brackets"),
    pytest.param('{"gamma": 1' + "0" * 5000 + "}", "too many digits", id="digits")])
def test_a_file_without_a_json_object_is_an_error(tmp_path, text, words):
    assert words in message(tmp_path, text)


def test_an_unreadable_file_is_not_reported_as_missing(tmp_path):
    (tmp_path / "params.json").symlink_to("params.json")
    with pytest.raises(UserError, match="symbolic links"):
        load_params(tmp_path / "params.json", SCRATCH)
    (tmp_path / "params.json").unlink()
    (tmp_path / "params.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        load_params(tmp_path / "params.json", SCRATCH)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_files_from_windows_are_read(tmp_path, encoding):
    (tmp_path / "params.json").write_bytes(json.dumps({**VALUES, "dataset": "folder:pêche"},
                                                      ensure_ascii=False).replace(" ", "\r\n").encode(encoding))
    assert load_params(tmp_path / "params.json", SCRATCH).dataset == "folder:pêche"


def test_binary_and_missing_files_are_errors(tmp_path):
    (tmp_path / "params.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_params(tmp_path / "params.json", SCRATCH)
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "nowhere" / "params.json", SCRATCH)


def test_overrides_are_json_or_strings():
    assert parse_overrides(["alpha=0.5", "schedule=[1, 2]", "dataset=folder:x=y", "augmentation=false", "a="]) == {
        "alpha": 0.5, "schedule": [1, 2], "dataset": "folder:x=y", "augmentation": False, "a": ""}
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_overrides(["alpha"])
    with pytest.raises(UserError, match="gives seed twice"):
        parse_overrides(["seed=1", "alpha=1", "seed=2"])


def test_a_method_that_redefines_a_key_of_its_stage_is_refused(monkeypatch):
    monkeypatch.setattr(Stage, "ALL", {})
    methods = Registry("attack")
    stage = Stage("test", SCRATCH.params, key="model_name", methods=methods)

    class Params(MethodParams):
        batch_size: float = 0.5

    class Subclass(SCRATCH.params):
        batch_size: int = 64

    methods.register("loud")(SimpleNamespace(Params=Params))
    methods.register("fine")(SimpleNamespace(Params=Subclass))
    with pytest.raises(ValueError, match="Params of 'loud' redefines batch_size of ScratchParams: rename, or subclass"):
        stage.params_of({"model_name": "loud"})
    assert stage.params_of({"model_name": "fine"}).model_fields["batch_size"].default == 64


def test_an_option_and_set_may_not_give_the_same_key(call, experiment):
    words = refused(call, "train_kd", experiment(), "--teacher_resume", "a.tar", "--set", "teacher_resume=b.tar")
    assert "--set and --teacher_resume give the same" in words


def of_experiment(values):
    """Parameter class for a params.json of the repository."""
    return stage_of(values).params_of(values)


@pytest.mark.parametrize(("stage", "values", "named"), [
    (SCRATCH, {"num_channels": 8, "dropout_rate": 0.5, "model_name": "mlp"}, ["num_channels", "dropout_rate"]),
    (SCRATCH, {"num_channels": 8, "gamma": 0.5, "schedule": [999]}, []),
    (SCRATCH, {"gamma": 0.5}, ["gamma"]),
    (SCRATCH, {"gamma": 0.1, "num_channels": 32, "model_name": "mlp"}, []),
    (SCRATCH, {"annealing": "cosine", "schedule": [3], "gamma": 0.5}, ["schedule", "gamma"]),
    (KD, {"target": 3}, ["target"]),
    (KD, {"target": 3, "trigger": "badnet_sq"}, []),
    (KD, {"teacher_model": "resnet18", "teacher_num_channels": 8}, ["teacher_num_channels"]),
    (POISONED, {"trigger": "sig", "surrogate_num_channels": 8}, ["surrogate_num_channels"]),
    (DATAFREE, {"method": "zskt", "sv_weight": 1.0, "sr_eta": 1.0, "backdoor_defense": "sr"}, ["sv_weight"]),
    (DATAFREE, {"method": "zskt", "sv_weight": 1.0, "sr_eta": 1.0, "backdoor_defense": "auto"}, [])])
def test_settings_without_effect_are_named(stage, values, named):
    kind = stage.params_of(values)
    params = {key: value for key, value in KD_VALUES.items() if key in kind.model_fields} | values
    assert [text.split('"')[1] for text in kind.model_validate(params).ineffective_parameter_warnings()] == named


def test_experiments_of_the_repository_have_no_settings_without_effect():
    assert [name for name, values in EXPERIMENTS.items()
            if of_experiment(values).model_validate(values).ineffective_parameter_warnings()] == []


def test_another_image_size_is_refused_except_for_older_runs(call, experiment):
    text = '"image_size" 64 has no effect: the images of demo are 32x32'
    assert text in refused(call, "train_scratch", experiment(dataset="demo"), "--set", "image_size=64")
    for size, remarks in ((64, [text]), (32, [])):
        params = SCRATCH.params(**VALUES, image_size=size)
        assert image_size_warnings(params, SimpleNamespace(image_size=32), Start(state="a checkpoint")) == remarks


def test_the_table_is_printed_to_a_reader_that_stops_early():
    command = f"{sys.executable} -m utils.params | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (done.stdout, done.stderr) == ("| key | type | default | stage | what |\n", "")
    done = subprocess.run([sys.executable, "-m", "utils.params", "nothing"], capture_output=True, text=True, cwd=ROOT,
                          env=environment())
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_changed_keys_names_values_and_ignores_keys_without_effect_on_results():
    new = SCRATCH.params.model_validate({**VALUES, "learning_rate": 0.1, "num_epochs": 4, "cuda": 0, "num_workers": 9})
    assert changed_keys(VALUES, new) == ["learning_rate (0.001 -> 0.1)"]
    assert changed_keys({**VALUES, "removed": 1}, new)[-1] == "removed (1 -> null)"


@pytest.mark.parametrize("registry", [attacks.REGISTRY, defenses.REGISTRY, ANSWER_DEFENSES, INTERFACES])
def test_the_documents_name_every_attack_defense_and_interface(registry):
    text = "".join((ROOT / "docs" / page).read_text() for page in ("attacks.md", "defenses.md"))
    assert not [name for name in registry if f"`{name}`" not in text and f"`{name}:" not in text]


def test_the_table_of_parameters_md_matches_the_code():
    assert (ROOT / "docs/parameters.md").read_text().endswith(markdown_table() + "\n")
