"""Drawing scripts, called like a user calls them."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from PIL import Image

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
COLOUR = [200, 7, 90]


@pytest.fixture
def inverted(tmp_path):
    """`inverted(name, **changes)` writes the last_model.tar of a method that stores images in `learner`."""
    def write(name, **changes):
        (tmp_path / name).mkdir()
        pool = {"images": torch.tensor(COLOUR, dtype=torch.uint8).expand(20, 32, 32, 3),
                "labels": torch.arange(20) % 10}
        content = {"state_dict": {"weight": torch.zeros(1)}, "learner": {"pool": pool},
                   "params": {"dataset": "demo", "image_size": 32, "method": "deepinversion"},
                   "data": {"classes": CLASSES}, "history": [{"test_accuracy": 52.5}],
                   "sources": {"teacher": {"path": str(tmp_path / "nowhere"), "sha256": ""}}, **changes}
        torch.save(content, tmp_path / name / "last_model.tar")
        return tmp_path / name
    return write


def as_earlier_versions_wrote(directory):
    """The run with the state of the learner at the top level, as earlier versions stored it."""
    content = torch.load(directory / "last_model.tar")
    torch.save(content | content.pop("learner"), directory / "last_model.tar")
    return directory


def show_inversions(*directories, out):
    words = [sys.executable, str(ROOT / "scripts/show_inversions.py"), *map(str, directories), "--out", str(out)]
    return subprocess.run(words, capture_output=True, text=True, env=environment())


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True])
def test_images_of_two_teachers_are_drawn_beside_test_images(inverted, tmp_path, earlier):
    directories = inverted("one"), inverted("two")
    if earlier:
        as_earlier_versions_wrote(directories[0])
    done = show_inversions(*directories, out=tmp_path / "picture.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    assert (pixels.view(-1, 3) == torch.tensor(COLOUR)).all(1).sum() == 2 * 20 * (3 * 32) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "words"), [({"data": {"classes": ["a", "b"]}}, "other images or classes"),
                                                ({"learner": {}}, "stores no images")])
def test_images_of_other_classes_and_runs_without_images_are_refused(inverted, tmp_path, changes, words):
    done = show_inversions(inverted("one", **changes), out=tmp_path / "picture.png")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.slow
def test_logits_of_two_teachers_are_drawn(call, experiment, tmp_path):
    pytest.importorskip("sklearn")
    directories = [experiment(name, dataset="demo", num_epochs=1, subset_fraction=0.01) for name in ("one", "two")]
    for directory in directories:
        assert call("train_scratch", directory).returncode == 0
    words = [sys.executable, str(ROOT / "scripts/show_teachers.py"), *map(str, directories), "--out",
             str(tmp_path / "out"), "--num_images", "2", "--names", "normal"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (2, "error: --names: 1 names for 2 directories: give one per directory\n")
    done = subprocess.run([*words, "nasty"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embeddings.png", "responses.png"]


def test_code_named_by_a_checkpoint_is_not_imported(tmp_path):
    (tmp_path / "theirs.py").write_text("open('was_imported', 'w')")
    (tmp_path / "run").mkdir()
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "params": {"dataset": "demo", "model_name": "theirs:build"}},
               tmp_path / "run/last_model.tar")
    done = subprocess.run([sys.executable, str(ROOT / "scripts/show_teachers.py"), "run"], capture_output=True,
                          text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 2 and "names code to import, theirs:build" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "was_imported").exists()
