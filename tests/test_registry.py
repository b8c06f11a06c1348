"""Registries: a file that cannot be imported is an error at every lookup until it is fixed."""
import sys

import pytest

from utils.registry import Registry

METHOD = """
from methods_of_test import REGISTRY

@REGISTRY.register({name!r})
class Method:
    pass
{more}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(name, more code)` writes a package of methods and returns its registry."""
    folder = tmp_path / "methods_of_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("""
from utils.registry import Registry

REGISTRY = Registry("method", package="methods_of_test")
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file may change within a second

    def write(name, more=""):
        (folder / f"{name}.py").write_text(METHOD.format(name=name, more=more))
        from methods_of_test import REGISTRY
        return REGISTRY

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "methods_of_test"]:
        del sys.modules[name]


def test_a_broken_file_is_an_error_at_every_lookup_until_it_is_fixed(package):
    package("a")
    registry = package("b", "import methods_of_test.c; import nowhere")
    package("c")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            registry.entry("a")
    package("b")
    assert list(registry) == ["a", "b", "c"]


def test_a_file_may_look_up_other_methods_during_its_import(package):
    package("a")
    assert list(package("b", "assert list(REGISTRY) == ['a', 'b']")) == ["a", "b"]


def test_two_methods_with_one_name_are_refused():
    registry = Registry("method")
    registry.register("a")(int)
    with pytest.raises(ValueError, match="two methods are registered as 'a'"):
        registry.register("a")(float)
