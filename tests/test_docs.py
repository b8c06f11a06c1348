"""README.md and docs/: links resolve, and commands name existing scripts, options and parameters."""
from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from runs.stages import stage_of_script

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_THE_USER = ("mine", "own", "speed", "precision")  # below experiments/, created by the reader
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """Anchors that a forge generates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@each_document
def test_links_resolve_to_files_and_headings(document):
    text = without_code(document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        page = (document.parent / file).resolve() if file else document
        assert page.exists(), target
        assert not fragment or fragment in anchors(page), target


def commands(document: Path) -> list[list[str]]:
    """Commands in shell blocks that call this repository, split into words."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.M | re.S):
        block = re.sub(r"<< '(\w+)'.*?^\1$", "", block, flags=re.M | re.S).replace("\\\n", " ")
        lines = re.findall(r"^ *(?:\w+=\S+ )*(?:python|bash|torchrun) (.+)$", block, re.M)
        found += [shlex.split(line, comments=True) for line in lines]
    return found


@cache
def usage(script: str) -> str:
    """Output of `python SCRIPT --help`."""
    arguments, printed = sys.argv, io.StringIO()
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = arguments
    return printed.getvalue()


@each_document
def test_files_of_parameters_are_valid_for_the_script_that_reads_them(document):
    if document.name == "extending.md":
        pytest.skip("its methods exist in tests/test_extending.py only")
    runs = [words for words in commands(document) if "--save_path" in words]
    scripts = {words[words.index("--save_path") + 1]: words[0] for words in runs}
    files = re.findall(r"^cat > (\S+)/params\.json << '(\w+)'\n(.*?)^\2$", document.read_text(), re.M | re.S)
    for path, _, text in files:
        reader = stage_of_script(scripts[path])
        values = json.loads(text)
        reader.params_of(values).model_validate(values)


@each_document
def test_commands_name_existing_scripts_options_and_parameters(document):
    for words in commands(document):
        if words[0] in ("-m", "-c", "-"):
            continue
        script = next(word for word in words if not word.startswith("-"))
        assert (ROOT / script).is_file(), words
        if not script.endswith(".py") or script == "experiments/make.py":
            continue
        text = usage(script)
        options = [word.split("=")[0] for word in words[words.index(script):] if re.fullmatch(r"--\w+(=.*)?", word)]
        assert not [option for option in options if not re.search(rf"{option}\b", text)], words
        if "--set" in words:
            pairs = [word for word in words[words.index("--set") + 1:] if re.match(r"\w+=", word)]
            known = {key for kind in stage_of_script(script).all_params().values() for key in kind.model_fields}
            assert not [pair for pair in pairs if pair.split("=")[0] not in known], words
        if "--save_path" in words:
            place = Path(words[words.index("--save_path") + 1])
            assert place.parts[1] in OF_THE_USER or (ROOT / place / "params.json").is_file(), words


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_listed_in_the_readme():
    text = (ROOT / "README.md").read_text()
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    assert not [page.name for page in pages if f"(docs/{page.name}" not in text]
