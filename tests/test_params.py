"""What a params.json may say, and what it is told when it says something else."""
import json
from pathlib import Path

import pytest
from conftest import EXPERIMENTS

from utils.errors import UserError
from utils.params import (
    STAGES,
    KDParams,
    NastyParams,
    PoisonedParams,
    ScratchParams,
    changed_keys,
    load_params,
    parse_overrides,
)
from utils.params.__main__ import markdown_table

SCRATCH = {"dataset": "demo", "model_name": "net", "learning_rate": 0.001, "num_epochs": 2}
KD = {**SCRATCH, "teacher_model": "net", "teacher_resume": "x.tar", "temperature": 4, "alpha": 0.9}


def load(tmp_path, values, kind=ScratchParams, overrides=None):
    path = tmp_path / "params.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return load_params(path, kind, overrides)


def message(tmp_path, values, kind=ScratchParams, overrides=None):
    with pytest.raises(UserError) as error:
        load(tmp_path, values, kind, overrides)
    text = str(error.value)
    assert "\n" not in text
    assert ("--set" if overrides else str(tmp_path / "params.json")) in text
    return text


def test_defaults_are_the_published_recipe(tmp_path):
    params = load(tmp_path, SCRATCH)
    assert (params.batch_size, params.gamma, params.augmentation, params.seed) == (128, 0.1, True, 0)


def test_switches_are_0_and_1_or_false_and_true(tmp_path):
    assert load(tmp_path, {**SCRATCH, "augmentation": 0}).augmentation is False
    assert load(tmp_path, {**SCRATCH, "augmentation": True}).augmentation is True


def test_an_integer_is_a_fine_temperature_and_overrides_replace_values(tmp_path):
    params = load(tmp_path, KD, KDParams, {"alpha": 0.5})
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
    text = message(tmp_path, {**SCRATCH, key: value})
    assert all(word in text for word in [f'"{key}"', *words])


def test_constants_of_pixels_up_to_255_are_refused_on_the_command_line_too(tmp_path):
    text = message(tmp_path, SCRATCH, overrides=parse_overrides(["mean=[125.3,123,113.9]"]))
    assert '--set: "mean" is [125.3, 123, 113.9]: should be at most 1' in text


@pytest.mark.parametrize("mean, std", [
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),  # a network for pixels in [0, 1] as they are
    ([0.4, 0.4, 0.4], [0.0039, 0.0039, 0.0039]),  # one for pixels in [0, 255], less their mean
    ([0.2, 0.3, 0.0], [0.2, 0.3, 0.0001]),  # the own constants of images without blue
    ([0.5, 0.5, 0.5], None)])
def test_constants_of_pixels_up_to_1_are_taken(tmp_path, mean, std):
    params = load(tmp_path, {**SCRATCH, "mean": mean, "std": std})
    assert (params.mean, params.std) == (mean, std)


def test_an_augmentation_has_a_name_and_another_one_is_a_change(tmp_path):
    params = load(tmp_path, SCRATCH, overrides=parse_overrides(["augmentation=shift"]))
    assert params.augmentation == "shift"
    assert changed_keys(SCRATCH, params) == ['augmentation (true -> "shift")']


def test_the_schema_for_editors_takes_the_switches_of_the_published_files():
    for name, values in EXPERIMENTS.items():
        kind = STAGES[values["method"]] if "method" in values else KDParams if "teacher_model" in values else \
            NastyParams if "weight" in values else PoisonedParams if "trigger" in values else ScratchParams
        schemas = kind.model_json_schema()["properties"]
        assert all(value in schemas[key]["enum"] for key, value in values.items() if "enum" in schemas[key]), name
        assert {"cuda"} <= {key for key in schemas if "enum" in schemas[key]}


def test_infinity_and_nan_are_no_numbers(tmp_path):
    assert '"learning_rate"' in message(tmp_path, {**SCRATCH, "learning_rate": float("inf")})
    assert '"learning_rate"' in message(tmp_path, {**SCRATCH, "learning_rate": float("nan")})


def test_all_wrong_values_are_named_at_once(tmp_path):
    text = message(tmp_path, {**SCRATCH, "learning_rate": -1, "gamma": 0})
    assert '"learning_rate"' in text
    assert '"gamma"' in text


def test_an_unknown_key_is_named_with_the_nearest_valid_one(tmp_path):
    text = message(tmp_path, {**SCRATCH, "leraning_rate": 0.1})
    assert 'unknown key "leraning_rate"' in text
    assert 'did you mean "learning_rate"' in text


def test_an_unknown_key_on_the_command_line_is_named_too(tmp_path):
    assert 'did you mean "num_epochs"' in message(tmp_path, SCRATCH, overrides={"num_epoch": 3})


def test_a_key_of_another_stage_names_that_stage(tmp_path):
    text = message(tmp_path, KD)
    assert 'unknown key "teacher_model" (train_kd.py and train_datafree.py would read it)' in text


def test_a_missing_key_is_named(tmp_path):
    text = message(tmp_path, SCRATCH, NastyParams)
    assert all(f'the key "{key}" is missing' in text for key in ("adversarial_model", "temperature", "weight"))


def test_invalid_json_is_named_with_its_line(tmp_path):
    text = message(tmp_path, '{\n  "dataset": "demo",\n  "model_name" "net"\n}')
    assert "line 3" in text


def test_a_key_that_stands_twice_is_an_error(tmp_path):
    assert '"gamma" appears twice' in message(tmp_path, '{"gamma": 0.1, "gamma": 0.2}')


@pytest.mark.parametrize("text, words", [
    ("[]", "a JSON object is expected"), ("3", "a JSON object is expected"), ("", "line 1, column 1: not valid JSON"),
    ("\x00", "not valid JSON"), ('{"dataset": "folder:/\\udce9"}', "half a character"),
    pytest.param("[" * 100_000, "too many brackets", id="brackets"),
    pytest.param('{"gamma": 1' + "0" * 5000 + "}", "too many digits", id="digits")])
def test_what_is_no_json_object_is_an_error(tmp_path, text, words):
    assert words in message(tmp_path, text)


def test_what_is_no_readable_file_is_not_said_to_be_absent(tmp_path):
    (tmp_path / "params.json").symlink_to("params.json")
    with pytest.raises(UserError, match="symbolic links"):
        load_params(tmp_path / "params.json", ScratchParams)
    (tmp_path / "params.json").unlink()
    (tmp_path / "params.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        load_params(tmp_path / "params.json", ScratchParams)


def test_a_file_that_is_no_text_or_not_there_is_an_error(tmp_path):
    (tmp_path / "params.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_params(tmp_path / "params.json", ScratchParams)
    with pytest.raises(UserError, match="does not exist"):
        load_params(tmp_path / "nowhere" / "params.json", ScratchParams)


def test_overrides_are_json_or_else_words():
    assert parse_overrides(["alpha=0.5", "schedule=[1, 2]", "dataset=folder:x=y", "augmentation=false", "a="]) == {
        "alpha": 0.5, "schedule": [1, 2], "dataset": "folder:x=y", "augmentation": False, "a": ""}
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_overrides(["alpha"])


def test_changed_keys_names_old_and_new_and_ignores_what_changes_no_result():
    new = ScratchParams.model_validate({**SCRATCH, "learning_rate": 0.1, "num_epochs": 4, "cuda": 0, "num_workers": 9})
    assert changed_keys(SCRATCH, new) == ["learning_rate (0.001 -> 0.1)"]
    assert changed_keys({**SCRATCH, "removed": 1}, new)[-1] == "removed (1 -> null)"


def test_the_table_of_the_readme_is_the_one_of_the_code():
    assert markdown_table() in (Path(__file__).parents[1] / "README.md").read_text()
