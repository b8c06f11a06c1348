"""Bad input ends in one clear line on stderr and exit status 2, without a traceback, and nothing is overwritten."""
import ctypes
import pickle
import resource
import shutil

import pytest
import torch
from conftest import Malicious, contents, refused

from model import MODEL_NAMES, build_model
from utils.errors import UserError
from utils.logger import Logger

KD = {"teacher_model": "net", "teacher_num_channels": 4, "temperature": 4, "alpha": 0.9}
NASTY = {"adversarial_model": "net", "adversarial_num_channels": 4, "temperature": 4, "weight": 0.04}
WRITTEN = {"augmented.png", "training.log", "metrics.csv", "results.json", "best_model.tar", "last_model.tar"}


def assert_refused(run, script, directory, *arguments, words):
    line = refused(run, script, directory, *arguments)
    for word in words:
        assert word in line


@pytest.fixture
def teacher(tmp_path):
    """Checkpoint of a `net` with 4 channels for 3 classes, in the format of the published code."""
    path = tmp_path / "teacher.tar"
    torch.save({"epoch": 1, "state_dict": build_model("net", 3, num_channels=4).state_dict(), "optim_dict": {}}, path)
    return str(path)


@pytest.mark.parametrize("script", ["train_scratch", "train_nasty", "train_kd"])
def test_a_missing_params_json_is_named(call, tmp_path, script):
    assert_refused(call, script, tmp_path, words=[str(tmp_path / "params.json"), "does not exist"])
    assert_refused(call, script, tmp_path / "nowhere", words=["params.json", "does not exist"])


def test_errors_of_a_process_are_one_line(stage, tmp_path):
    assert_refused(lambda *a: stage(*a, check=False), "train_scratch", tmp_path, words=["params.json"])


def test_invalid_json_names_the_line(call, tmp_path):
    (tmp_path / "params.json").write_text('{"dataset": "demo",\n "model_name": net}')
    assert_refused(call, "train_scratch", tmp_path, words=["params.json", "line 2"])
    (tmp_path / "params.json").write_text('{"dataset": "demo"\n "model_name": "net"}')
    assert_refused(call, "train_scratch", tmp_path, words=["params.json", "line 1", "Expecting ','"])


def test_an_unknown_key_names_the_nearest_key(call, experiment):
    assert_refused(call, "train_scratch", experiment(lerning_rate=1), words=['"lerning_rate"', '"learning_rate"'])
    assert_refused(call, "train_scratch", experiment(), "--set", "batchsize=4", words=['"batchsize"', '"batch_size"'])


def test_a_wrong_value_names_key_value_and_allowed_values(call, experiment):
    assert_refused(call, "train_scratch", experiment(num_epochs="ten"), words=['"num_epochs"', '"ten"', "integer"])
    assert_refused(call, "train_scratch", experiment(learning_rate=-1), words=['"learning_rate"', "-1", "greater than"])


def test_errors_on_the_command_line_do_not_name_the_file(call, experiment):
    line = refused(call, "train_scratch", experiment(), "--set", "schedule=3,4", "num_epochs=no")
    assert "params.json" not in line
    assert all(word in line for word in ("--set", '"3,4"', "[3,4]", '"no"'))


@pytest.mark.parametrize("given, meant", [("3,4", "[3,4]"), ("[3, 4", "[3,4]"), ("3", "[3]"), ("[a,b]", '["a","b"]')])
def test_a_value_that_is_no_list_is_suggested_as_one(call, experiment, given, meant):
    line = refused(call, "train_scratch", experiment(), "--set", f"schedule={given}")
    assert line.startswith("error: --set: ") and line.endswith(f"should be a valid list, such as {meant}")


def test_an_unknown_method_on_the_command_line_does_not_name_the_file(call, experiment, teacher):
    line = refused(call, "train_kd", experiment(**KD, teacher_resume=teacher), "--set", "attack=dkdd")
    assert line.startswith('error: --set: "attack" is "dkdd"')


def test_the_params_json_of_another_stage_names_that_stage(call, experiment, teacher):
    directory = experiment(**KD, teacher_resume=teacher)
    assert_refused(call, "train_nasty", directory, words=["is for train_kd.py, not for train_nasty.py"])
    assert_refused(call, "train_kd", experiment(), words=["is for train_scratch.py, not for train_kd.py"])
    assert_refused(call, "train_scratch", experiment(), "--set", "alpha=1", words=["key of train_nasty.py and"])


def test_a_path_to_params_json_instead_of_its_directory_is_refused(call, experiment):
    assert_refused(call, "train_scratch", experiment() / "params.json", words=["must be a directory"])


@pytest.mark.parametrize("arguments, words", [(("--gpu_id", "0,1"), ["--gpu_id", "'0,1'"]),
                                              (("--sett", "x=1", "y"), ["--sett"])])
def test_a_wrong_command_line_is_refused(call, experiment, arguments, words):
    assert_refused(call, "train_scratch", experiment(), *arguments, words=[*words, "--help"])


def test_an_unknown_model_names_the_choices(call, experiment, teacher):
    assert_refused(call, "train_scratch", experiment(model_name="resnet19"),
                   words=["model_name", "resnet19", *MODEL_NAMES])
    assert_refused(call, "train_kd", experiment(**{**KD, "teacher_model": "vgg"}, teacher_resume=teacher),
                   words=["teacher_model", "vgg", *MODEL_NAMES])
    assert_refused(call, "train_nasty", experiment(**{**NASTY, "adversarial_model": "vgg"}, adversarial_resume=teacher),
                   words=["adversarial_model", "vgg", *MODEL_NAMES])
    assert_refused(call, "train_scratch", experiment(model_name="resnet20"), words=["did you mean 'preresnet20'?"])


def test_an_unknown_data_set_names_the_choices(call, experiment):
    assert_refused(call, "train_scratch", experiment(dataset="cifar11"),
                   words=["cifar11", "cifar10", "cifar100", "tiny_imagenet", "fashion_mnist", "gtsrb", "demo",
                          "folder:"])


def test_missing_data_names_the_files_their_place_and_their_source(call, experiment):
    directory = experiment(dataset="tiny_imagenet")
    assert_refused(call, "train_scratch", directory,
                   words=[str(directory.parent / "data" / "tiny-imagenet-200"), "http://", "unpack"])
    assert_refused(call, "train_scratch", experiment(dataset="folder:/no/such/place"),
                   words=["/no/such/place", "PATH/train"])


def test_a_network_that_does_not_fit_the_images_is_refused(call, experiment):
    assert_refused(call, "train_scratch", experiment(image_size=64),
                   words=["model_name", "3x32x32", "3x64x64", "image_size"])


def test_a_missing_checkpoint_is_named(call, experiment):
    assert_refused(call, "train_kd", experiment(**KD, teacher_resume="no/best_model.tar"),
                   words=["teacher_resume", "no/best_model.tar", "does not exist"])
    assert_refused(call, "train_nasty", experiment(**NASTY, adversarial_resume="no/best_model.tar"),
                   words=["adversarial_resume", "no/best_model.tar", "does not exist"])
    assert_refused(call, "train_scratch", experiment(), "--resume", "no/best_model.tar", words=["no/best_model.tar"])


def test_a_missing_init_checkpoint_is_named(call, experiment, teacher):
    assert_refused(call, "train_nasty", experiment(**NASTY, adversarial_resume=teacher, init_from="no.tar"),
                   words=["init_from", "no.tar", "does not exist"])


def test_a_truncated_checkpoint_is_refused(call, experiment, teacher, tmp_path):
    cut = tmp_path / "cut.tar"
    cut.write_bytes((tmp_path / "teacher.tar").read_bytes()[:-200])
    assert_refused(call, "train_kd", experiment(**KD, teacher_resume=teacher), "--teacher_resume", cut,
                   words=["teacher_resume", str(cut), "truncated"])


def test_a_mismatching_checkpoint_names_file_name_and_shapes(call, experiment, teacher):
    directory = experiment(**{**KD, "teacher_num_channels": 6}, teacher_resume=teacher)
    assert_refused(call, "train_kd", directory, words=[teacher, "conv1.weight", "(4, 3, 3, 3)", "(6, 3, 3, 3)"])
    directory = experiment(**{**KD, "teacher_model": "mlp"}, teacher_resume=teacher)
    assert_refused(call, "train_kd", directory, words=[teacher, "fc1.weight", "(512, 3072)"])


def test_a_teacher_with_another_class_count_is_refused(call, experiment, tmp_path):
    torch.save({"state_dict": build_model("net", 100, num_channels=4).state_dict()}, tmp_path / "hundred.tar")
    assert_refused(call, "train_kd", experiment(**KD, teacher_resume=str(tmp_path / "hundred.tar")),
                   words=["teacher", "hundred.tar", "100 classes", "has 3"])


@pytest.mark.parametrize("name", ["teacher", "resume", "init_from", "last"])
def test_a_malicious_checkpoint_executes_nothing_in_any_role(call, experiment, teacher, tmp_path, name):
    evil, victim = tmp_path / "evil.tar", tmp_path / "executed"
    torch.save({"epoch": 1, "state_dict": Malicious(victim)}, evil)
    if name == "teacher":
        assert_refused(call, "train_kd", experiment(**KD, teacher_resume=str(evil)), words=[str(evil), "not executed"])
    elif name == "resume":
        assert_refused(call, "train_scratch", experiment(), "--resume", evil, words=[str(evil), "not executed"])
    elif name == "init_from":
        directory = experiment(**NASTY, adversarial_resume=teacher, init_from=str(evil))
        assert_refused(call, "train_nasty", directory, words=[str(evil), "not executed"])
    else:
        directory = experiment()
        evil.rename(directory / "last_model.tar")
        assert_refused(call, "train_scratch", directory, words=["last_model.tar", "not executed", "--restart"])
    assert not victim.exists()
    with pytest.raises(FileNotFoundError):  # the pickle is malicious: `pickle.load` would create a directory
        pickle.loads(pickle.dumps(Malicious(tmp_path / "no" / "parent")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("arguments", [("--device", "cuda"), ("--device", "cuda:1"),
                                       ("--device", "auto", "--gpu_id", "0"),
                                       ("--device", "auto", "--gpu_id", "0", "1")])
def test_cuda_without_a_gpu_is_refused(call, experiment, arguments):
    asked = " ".join(arguments[2:] or arguments)
    assert_refused(call, "train_scratch", experiment(), *arguments, words=["no CUDA device", asked])


@pytest.mark.parametrize("arguments, word", [(("--device", "tpu"), "tpu"), (("--device", "cuda:x"), "cuda:x"),
                                             (("--device", "cpu", "--gpu_id", "0"), "contradict")])
def test_an_unknown_device_is_refused(call, experiment, arguments, word):
    assert_refused(call, "train_scratch", experiment(), *arguments, words=[word])


def test_set_without_a_value_is_refused(call, experiment):
    assert_refused(call, "train_scratch", experiment(), "--set", "num_epochs", words=["KEY=VALUE", "num_epochs"])


def test_a_teacher_whose_outputs_are_not_finite_is_refused_before_anything_is_removed(call, experiment, tmp_path):
    weights = build_model("net", 3, num_channels=4).state_dict()
    torch.save(weights, tmp_path / "good.tar")
    weights["fc2.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.tar")
    directory = experiment(**KD, teacher_resume=str(tmp_path / "good.tar"), num_epochs=1)
    assert call("train_kd", directory).returncode == 0
    assert_refused(call, "train_kd", directory, "--restart", "--teacher_resume", tmp_path / "nan.tar",
                   words=["teacher", "not finite"])


def test_resume_without_a_run_is_refused(call, experiment):
    assert_refused(call, "train_scratch", experiment(), "--resume", words=["last_model.tar", "no run to resume"])
    assert_refused(call, "train_scratch", experiment(), "--resume", "--restart", words=["contradict"])


def test_a_foreign_best_model_is_not_overwritten(call, experiment, teacher):
    directory = experiment()
    shutil.copy(teacher, directory / "best_model.tar")
    assert_refused(call, "train_scratch", directory, words=["best_model.tar", "--restart"])


def _without_the_right_to_write_anywhere():
    """Run in the child: enforce permissions even for root (drops CAP_DAC_OVERRIDE from the bounding set)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.mark.slow
def test_an_unwritable_directory_is_refused(stage, experiment):
    directory = experiment()
    directory.chmod(0o555)
    try:
        assert_refused(lambda *a: stage(*a, check=False, preexec_fn=_without_the_right_to_write_anywhere),
                       "train_scratch", directory, words=[str(directory), "Permission denied"])
    finally:
        directory.chmod(0o755)


def test_a_full_disk_keeps_the_last_good_checkpoint(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    before = contents(directory)
    (directory / ".last_model.tar.tmp").symlink_to("/dev/full")  # every write there fails with ENOSPC
    done = call("train_scratch", directory, "--set", "num_epochs=2")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 1
    after = contents(directory)
    assert after["last_model.tar"] == before["last_model.tar"]
    assert after["best_model.tar"] == before["best_model.tar"]
    assert call("train_scratch", directory, "--set", "num_epochs=2").returncode == 0


def _with_small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.slow
def test_a_full_disk_for_tensorboard_is_one_line(stage, experiment):
    done = stage("train_scratch", experiment(num_channels=2, batch_size=40), check=False,
                 preexec_fn=_with_small_files)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: cannot write: File too large"


def test_a_bad_restart_removes_nothing(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    assert_refused(call, "train_scratch", directory, "--restart", "--set", "dataset=folder:/no/such/place",
                   words=["/no/such/place"])


def test_help_prints_no_traceback(stage, tmp_path):
    done = stage("train_kd", tmp_path, "--help")
    assert all(word in done.stdout for word in ("KL(", "--save_path", "--teacher_resume", "--restart", "--set"))


def test_the_base_experiment_of_these_tests_is_valid(call, experiment):
    directory = experiment(num_epochs=1)
    assert call("train_scratch", directory).returncode == 0
    names = {path.name for path in directory.iterdir()}
    assert names >= WRITTEN
    assert all(name in WRITTEN | {"params.json"} or name.startswith("events.out.tfevents") for name in names)


def test_control_characters_of_a_file_are_escaped(call, experiment, tmp_path):
    """Keys and names come from untrusted files: they must not forge lines or control the terminal."""
    torch.save({"a\nerror: fake\x1b[31m\x9b\u2028\u202e": 1}, tmp_path / "x.tar")
    line = refused(call, "train_kd", experiment(**KD, teacher_resume=str(tmp_path / "x.tar")))
    assert "a\\nerror: fake\\x1b[31m\\x9b\\u2028\\u202e" in line and line.isprintable()


def test_control_characters_are_escaped_in_the_log_and_in_the_terminal(tmp_path, capsys):
    logger = Logger(tmp_path, [])
    logger.info("ä ± 猫 a\nb\x1b[2J\r")
    logger.stopped(UserError("\x1b[31mred"))
    logger.close()
    assert capsys.readouterr().out == "ä ± 猫 a\\nb\\x1b[2J\\r\n"
    first, last = (line.partition("  ")[2] for line in (tmp_path / "training.log").read_text().splitlines())
    assert first == "ä ± 猫 a\\nb\\x1b[2J\\r" and last == "stopped: \\x1b[31mred"
