"""Layering: imports point one way, between packages and between the layers of `utils`."""
import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

import utils

# Packages of the repository that each package may import, besides itself.
ARROWS = {"model": set(), "utils": set(), "backdoor": {"utils"}, "attacks": {"utils", "model"},
          "defenses": {"utils", "model"}, "datafree": {"utils", "model", "backdoor"},
          "runs": {"utils", "model", "attacks", "defenses", "datafree", "backdoor"}, "reports": {"utils", "runs"},
          "audits": {"utils", "model", "attacks", "defenses", "runs", "reports"}, "experiments": set()}
# Entry points: files beside the packages, and two directories. No package imports them.
PROGRAMS = (*sorted(file.stem for file in ROOT.glob("*.py")), "scripts", "benchmarks")
ARROWS |= dict.fromkeys(PROGRAMS, set(ARROWS) - {"experiments"})


def modules():
    for package in ARROWS:
        for file in sorted([*ROOT.glob(f"{package}.py"), *(ROOT / package).rglob("*.py")]):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, file


def imports(file):
    """Modules of the repository that a file imports, including in functions, without those for annotations only."""
    tree = ast.parse(file.read_text())
    annotations = [node for branch in ast.walk(tree) if isinstance(branch, ast.If)
                   and ast.unparse(branch.test) == "TYPE_CHECKING" for node in ast.walk(branch)]
    for node in ast.walk(tree):
        if node in annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = ROOT.joinpath(*node.module.split(".")).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if package else []
            yield from [name for name in names if name in NAMES] or [node.module]


NAMES = {name for name, _ in modules()}
GRAPH = {name: {found for found in imports(file) if found.split(".")[0] in ARROWS} for name, file in modules()}
MAP = {module: layer for layer, words in re.findall(r"^    (\w+) +(.+(?:\n {14}.+)*)$", utils.__doc__, re.MULTILINE)
       for module in re.split(r",\s+", words)}
LAYERS = list(dict.fromkeys(MAP.values()))


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_lies_below_it(package):
    found = {(name, other) for name, others in GRAPH.items() if name.split(".")[0] == package for other in others
             if other.split(".")[0] not in ARROWS[package] | {package}}
    assert not found


def test_imports_have_no_cycle():
    inner = {name: {other for other in others if other != name.rpartition(".")[0]} for name, others in GRAPH.items()}
    list(TopologicalSorter(inner).static_order())  # raises CycleError


def test_every_module_of_utils_has_its_place_in_the_map():
    assert {name.split(".")[1] for name in GRAPH if name.startswith("utils.")} == set(MAP)


def test_no_layer_of_utils_imports_a_higher_one():
    upward = {(name, other) for name, others in GRAPH.items() if name.startswith("utils.") for other in others
              if LAYERS.index(MAP[other.split(".")[1]]) < LAYERS.index(MAP[name.split(".")[1]])}
    assert not upward


def public_names(node):
    """Methods, properties and attributes of a class. The fields of dataclasses, of parameters and of the classes of a
    JSON file are data, and not counted."""
    data = any("dataclass" in ast.unparse(each) for each in node.decorator_list) or any(
        word in ast.unparse(base) for base in node.bases for word in ("Params", "BaseModel"))
    names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    if not data:
        names |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        names |= {target.attr for item in ast.walk(node) if isinstance(item, ast.Assign | ast.AnnAssign)
                  for group in (item.targets if isinstance(item, ast.Assign) else [item.target])
                  for target in ast.walk(group) if isinstance(target, ast.Attribute)
                  and isinstance(target.value, ast.Name) and target.value.id == "self"}
    return {name for name in names if not name.startswith("_")}


def test_no_class_has_more_than_twelve_public_names():
    wide = {f"{name}.{node.name}": sorted(public_names(node)) for name, file in modules()
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ClassDef) and len(public_names(node)) > 12 and name.split(".")[0] not in PROGRAMS}
    assert not wide
