"""Running out of memory ends in one line that names the phase and the size of the allocation."""
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, command, environment, refused

import train_scratch
from runs.stages import ScratchParams
from utils import checkpoint, evaluation
from utils.distributed import synchronized_errors
from utils.errors import UserError
from utils.memory import OutOfMemory, Phase, reduce

HUGE = 2**50  # bytes: more than a process can address
CUDA = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free. Process 7 has 77.91 GiB memory in use.")


def raises(error):
    raise error


def damaged(error):
    """Simulates a decoder that reports any error as a damaged file."""
    try:
        raise error
    except Exception:
        raise UserError("the file is damaged") from None


def while_handling(error, raised, *cause):
    """Raise an error while another is handled: plainly, from a cause, or from None."""
    try:
        raise error
    except type(error):
        if cause:
            raise raised from cause[0]
        raise raised  # noqa: B904


@pytest.mark.parametrize("fail, reason", [
    (lambda: torch.empty(HUGE, dtype=torch.uint8), "cannot allocate 1024 TiB"),
    (lambda: np.empty(HUGE, np.uint8), "cannot allocate 1.00 PiB"),
    (lambda: raises(torch.cuda.OutOfMemoryError(CUDA)),
     "cannot allocate 2.00 GiB (GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free)"),
    (lambda: raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
     "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (lambda: raises(MemoryError()), "cannot allocate more"),
    (lambda: raises(RuntimeError("std::bad_alloc")), "std::bad_alloc"),
    (lambda: raises(RuntimeError("can't start new thread")), "can't start new thread"),
    (lambda: raises(OSError(12, "Cannot allocate memory", "file")), "Cannot allocate memory"),
    (lambda: raises(ImportError("libx.so: failed to map segment from shared object")), "libx.so: failed to map"),
    (lambda: damaged(MemoryError()), "cannot allocate more"),
    *((functools.partial(while_handling, MemoryError(), kind("damaged")), "cannot allocate more")
      for kind in (UserError, OSError, ValueError, RuntimeError)),
    (lambda: while_handling(ValueError(), KeyError("x"), MemoryError()), "cannot allocate more"),
])
def test_out_of_memory_errors_of_every_allocator_are_recognized(fail, reason):
    with pytest.raises(OutOfMemory) as error, Phase("decoding the images", "use fewer"):
        fail()
    text = str(error.value)
    assert text.startswith("decoding the images: out of memory: ")
    assert reason in text
    assert text.endswith("; use fewer")
    assert "\n" not in text


def test_running_out_of_memory_does_not_make_a_checkpoint_damaged(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "x.tar")
    monkeypatch.setattr(torch, "load", lambda *_, **__: raises(MemoryError()))
    with pytest.raises(OutOfMemory, match="cannot allocate more"), Phase():
        checkpoint.load(tmp_path / "x.tar")


@pytest.mark.parametrize("other", [RuntimeError("shapes cannot be multiplied"), UserError("out of memory, he said"),
                                   FileNotFoundError(2, "No such file"), KeyboardInterrupt()])
def test_other_errors_are_not_changed(other):
    with pytest.raises(type(other)) as error, Phase("decoding the images"):
        raise other
    assert error.value is other


@pytest.mark.parametrize(("other", "cause"), [(KeyError("bug in fallback"), [None]), (KeyError("bug in fallback"), []),
                                              (TypeError("bug"), []), (ValueError("bug"), [None])])
def test_a_bug_while_memory_was_short_is_shown_as_the_bug(other, cause):
    with pytest.raises(type(other)) as error, Phase("decoding the images"):
        while_handling(MemoryError(), other, *cause)
    assert error.value is other


def test_phases_are_named_from_the_outermost_to_the_innermost_with_the_innermost_remedy():
    records = []
    with pytest.raises(OutOfMemory) as error, Phase(), Phase("epoch 2", "wait"), synchronized_errors(), \
            Phase(lambda: f"step {len(records) + 1}"):
        records.append(1)
        raise MemoryError
    assert str(error.value).startswith("epoch 2, step 2: out of memory: cannot allocate more")
    assert str(error.value).endswith("; wait")
    with pytest.raises(OutOfMemory, match=r"; now$"), Phase("epoch 2", "wait"), Phase("step 1", "now"):
        raise MemoryError


def test_the_tensors_of_what_failed_are_freed():
    freed = []

    def fail():
        class Large:
            def __del__(self):
                freed.append(True)
        large = Large()  # noqa: F841
        raise MemoryError
    with pytest.raises(OutOfMemory), Phase():
        fail()
    assert freed


def test_a_remedy_names_parameters_that_can_be_reduced():
    params = {"dataset": "folder:x", "model_name": "net", "learning_rate": 1, "batch_size": 8, "num_epochs": 1}
    keys = "batch_size", "image_size", "synthesis_batch_size"
    assert reduce(ScratchParams(**params, image_size=64), *keys) == 'reduce "batch_size" or "image_size"'
    assert reduce(ScratchParams(**params), *keys) == 'reduce "batch_size"'
    assert reduce(ScratchParams(**params | {"dataset": "cifar10"}), "image_size") == ""


def test_a_network_too_large_for_memory_is_refused_before_writing(call, experiment, monkeypatch):
    monkeypatch.setattr(train_scratch, "build_model", lambda *_, **__: torch.empty(HUGE, dtype=torch.uint8))
    line = refused(call, "train_scratch", experiment())
    assert "building the network: out of memory: cannot allocate" in line
    assert 'choose a smaller network ("model_name")' in line


def test_an_out_of_memory_step_is_named_and_the_last_checkpoint_is_kept(call, experiment, monkeypatch):
    steps = []

    def crowded(logits, labels, **options):
        steps.append(len(labels))
        if len(steps) == 9:  # the third of the second epoch: 45 images in batches of 8
            raise torch.cuda.OutOfMemoryError(CUDA)
        return torch.nn.functional.cross_entropy(logits, labels)
    monkeypatch.setattr(train_scratch, "cross_entropy", crowded)
    directory = experiment()
    done = call("train_scratch", directory)
    assert done.returncode == 2
    assert done.stderr == ("error: epoch 2, step 3: out of memory: cannot allocate 2.00 GiB (GPU 0 has a total "
                           'capacity of 79.11 GiB of which 1.20 GiB is free); reduce "batch_size"; saved '
                           "checkpoints are kept\n")
    assert "stopped: epoch 2, step 3: out of memory" in (directory / "training.log").read_text()
    assert torch.load(directory / "last_model.tar", weights_only=True)["epoch"] == 1
    assert call("train_scratch", directory).returncode == 0  # continues once there is enough memory


def test_an_out_of_memory_evaluation_is_named(call, experiment, monkeypatch):
    monkeypatch.setattr(evaluation, "confusion_matrix", lambda *_: np.empty(HUGE, np.uint8))
    done = call("train_scratch", experiment())
    assert done.returncode == 2
    assert done.stderr.startswith("error: evaluating the network: out of memory: cannot allocate 1.00 PiB")


LIMITED = """
import resource, sys, train_scratch
from pathlib import Path
from utils.cli import main
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, size + 2**24))
main(train_scratch.train_scratch)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_too_little_address_space_for_the_images_is_one_line(experiment):
    """45 images of 512 x 512 pixels in 16 MiB."""
    def run(*arguments):
        call = command(*arguments)
        return subprocess.run([sys.executable, "-c", LIMITED, *call[2:]], capture_output=True, text=True, cwd=ROOT,
                              env=environment())
    line = refused(run, "train_scratch", experiment(image_size=512))
    assert line.startswith("error: decoding the images: out of memory: cannot allocate 33.8 MiB (limit of ulimit -v: ")
    assert line.endswith('; reduce "image_size"')
