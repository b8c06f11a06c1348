"""The code blocks of docs/abd_in_your_loop.md, unchanged, on small networks."""
import ast
import copy
import importlib
import re
import sys

import pytest
import torch
from conftest import ROOT

from datafree.vaccine import ShuffledTeacher

TEXT = (ROOT / "docs" / "abd_in_your_loop.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
FEW = {"steps": 3, "batch_size": 8, "latent_size": 6, "student_steps": 2}


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """`blocks(name)` imports a block as a module, like a reader who saved each block as a file."""
    for name, block in BLOCKS.items():
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module
    for name in BLOCKS:
        sys.modules.pop(name, None)


@pytest.fixture
def networks(blocks):
    """Teacher, student and generator of 16x16 images; the teacher has the batch-norm statistics of noise."""
    torch.manual_seed(0)
    made = blocks("networks")
    teacher, student = made.classifier(8), made.classifier(4)
    teacher[-1].weight.data *= 20  # outputs that depend on the image
    for _ in range(20):
        teacher(torch.randn(16, 3, 16, 16))
    return teacher, student, made.image_generator(latent_size=6, width=4, size=16)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(network, before):
    return all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def distilled(loop, networks, seed=1, **options):
    """Result of `distill` of a block; asserts that student and generator change, and the teacher does not."""
    before = [weights(network) for network in networks]
    torch.manual_seed(seed)
    result = loop.distill(*networks, **FEW, **options)
    assert [same(network, then) for network, then in zip(networks, before, strict=True)] == [True, False, False]
    assert all(parameter.grad is None for parameter in networks[0].parameters())
    return result


def test_the_plain_loop_trains_student_and_generator(blocks, networks):
    distilled(blocks("loop"), networks)


def test_the_vaccine_is_in_the_generators_loss_and_moves_the_generator(blocks, networks):
    networks[0][-1].bias.data[1] = 10.0  # teacher and copies agree on most images, so the vaccine has a gradient
    plain, vaccinated = copy.deepcopy(networks), networks
    off = distilled(blocks("loop_vaccine"), plain, sv_weight=0.0, image_size=16)
    on = distilled(blocks("loop_vaccine"), vaccinated, sv_weight=0.5, image_size=16)
    assert len(on) == FEW["steps"] and on[0]["suspicious"] > 0.5 and on[0]["k"] > 0
    assert on[0]["vaccine"] < 0 == off[0]["vaccine"]
    assert on[0]["loss"] == pytest.approx(off[0]["loss"] + on[0]["vaccine"])
    assert not same(vaccinated[2], weights(plain[2]))


def test_without_weight_the_vaccinated_loop_is_the_plain_one(blocks, networks):
    others = copy.deepcopy(networks)
    distilled(blocks("loop"), networks)
    distilled(blocks("loop_vaccine"), others, sv_weight=0.0, image_size=16)
    assert same(others[1], weights(networks[1])) and same(others[2], weights(networks[2]))


def test_the_search_turns_the_vaccine_on_when_a_shuffle_has_a_tail(blocks, networks):
    module, teacher = blocks("selection"), networks[0].eval()
    shuffled, images = ShuffledTeacher(teacher, image_size=16), torch.randn(4, 3, 16, 16)
    drawn = [permutation.clone() for permutation in shuffled.permutations[0].values()]
    assert {module.coefficient(teacher(images), shuffled, images) for _ in range(50)} == {0}
    assert module.selection.ratios == [0.0]  # four images have no tail, so the next shuffle is tried
    assert not all(map(torch.equal, drawn, shuffled.permutations[0].values()))
    module.selection.ratios.append(0.03)
    assert module.coefficient(teacher(images), shuffled, images) == 0.1


def test_without_a_generator_the_student_ascends_on_suspicious_images(blocks, networks):
    teacher, student, _ = networks
    teacher.eval()
    module, images = blocks("student_vaccine"), torch.randn(8, 3, 16, 16)
    agreeing, loss = ShuffledTeacher(teacher, layers=0), {}
    for weight in (0.0, 0.5):
        loss[weight] = module.vaccinated_loss(teacher, student, agreeing, images, sv_weight=weight)
    assert loss[0.0] == 0 and loss[0.5] < 0  # all images are suspicious
    loss[0.5].backward()
    assert any(parameter.grad.any() for parameter in student.parameters())


def test_self_retrospection_finds_a_perturbation_and_changes_the_student(blocks, networks):
    others = copy.deepcopy(networks)
    none = distilled(blocks("loop_retrospection"), others, sr_from=1.0)
    assert none == (None, [])
    delta, history = distilled(blocks("loop_retrospection"), networks, sr_from=0.5)
    assert len(history) == 4  # two of three steps, two steps of the student each
    assert delta.shape == (1, 3, 16, 16) and delta.norm().item() == pytest.approx(history[-1]["delta_norm"])
    assert all(row["kl_after"] > 10 * row["kl_before"] > 0 and row["hypergradient_norm"] > 0 for row in history)
    assert networks[1].training and not same(networks[1], weights(others[1]))


def test_the_hypergradient_moves_the_student_by_its_weight(blocks, networks):
    others = copy.deepcopy(networks)
    for weight, each in ((0.0, networks), (100.0, others)):
        distilled(blocks("loop_retrospection"), each, sr_from=0.0, sr_weight=weight)
    assert not torch.equal(networks[1][0].weight, others[1][0].weight)


def test_the_files_to_copy_only_import_each_other_and_torch():
    files = [file for file in re.findall(r"`(\w+/\w+\.py)`", TEXT.split("## Your loop")[0])]
    known = {file.removesuffix(".py").replace("/", ".") for file in files}
    assert len(known) == 6
    for file in known:
        for node in ast.walk(ast.parse((ROOT / f"{file.replace('.', '/')}.py").read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name in known or alias.name.split(".")[0] in {"torch", *sys.stdlib_module_names}, file
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                top = node.module.split(".")[0]
                assert names & known or top in {"torch", *sys.stdlib_module_names}, (file, node.module)
