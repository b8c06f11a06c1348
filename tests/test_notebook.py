"""The notebook of docs: its stored outputs, and its code, run with small teachers that it trains elsewhere.

To run it again and store its outputs, after `bash scripts/demo.sh` has trained the teachers:

    notebook = nbformat.read("docs/steal_and_protect.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute()
    nbformat.write(notebook, "docs/steal_and_protect.ipynb")
"""
import json
import re
import subprocess
import sys
from itertools import product

import nbclient
import nbformat
import pytest
from conftest import FEW, ROOT

NOTEBOOK = ROOT / "docs" / "steal_and_protect.ipynb"
MODELS, ATTACKS = ("normal", "nasty", "protected"), ("KD, T = 20", "KD, T = 1", "hard labels")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Printed output of a cell."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_stores_the_outputs_of_one_run(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type in ("stream", "display_data") for output in cell.outputs), cell.id
        assert bool(texts(cell)) == bool(re.search(r"^\s*print\(", cell.source, re.MULTILINE)), cell.id
        drawn = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert bool(drawn) == bool(re.search(r"^(plt\.show|show)\(", cell.source, re.MULTILINE)), cell.id


def test_the_notebook_contains_no_machine_paths_and_is_small(notebook):
    text = NOTEBOOK.read_text()
    assert str(ROOT) not in text
    assert not re.search(r"/(root|home|work|tmp|Users|usr|opt)/|site-packages|Warning", text)
    assert len(text) < 300_000
    assert not any(set(cell.metadata) - {"tags"} for cell in notebook.cells)


def test_the_outputs_match_the_text(notebook):
    outputs = {cell.id: texts(cell) for cell in code_cells(notebook)}
    assert "100.0 %" in outputs["steal-protected"]
    strongest = dict(re.findall(r"^(\w+) +strongest attack: (.+?), \d", outputs["figure-all"], re.MULTILINE))
    assert list(strongest) == list(MODELS)
    assert strongest["nasty"] != "KD, T = 20"
    assert strongest["protected"] == "hard labels"


def test_ruff_accepts_the_notebook():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", str(NOTEBOOK)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_links_of_the_notebook_lead_to_files(notebook):
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).is_file(), link


@pytest.mark.slow
def test_the_notebook_runs_from_docs_and_trains_missing_teachers(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's settings
    teachers, recipe = tmp_path / "teachers", {"model_name": "net", "dataset": "demo", "augmentation": 0}
    recipe |= FEW | {"num_channels": 8, "learning_rate": 0.01, "batch_size": 64, "subset_size": 2000}
    normal, nasty = teachers / "baseline/net16", teachers / "kd_nasty_net16/nasty_net16"
    weights = str(normal / "last_model.tar")
    for directory, more in (
            (normal, {}),
            (nasty, {"learning_rate": 0.001, "adversarial_model": "net", "adversarial_num_channels": 8,
                     "init_from": weights, "adversarial_resume": weights, "temperature": 20, "weight": 0.04})):
        directory.mkdir(parents=True)
        (directory / "params.json").write_text(json.dumps(recipe | more))
    constants = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    constants.source += f"\nTEACHERS, IMAGES, EPOCHS = {str(teachers)!r}, 300, 8"
    notebook.cells.append(nbformat.v4.new_code_cell(
        "import json\nprint(json.dumps([labels_alone, [[*key, value] for key, value in accuracy.items()], "
        "[quality(each, dataset.test_labels)['accuracy'] for each in logits.values()]]))"))

    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    labels_alone, students, both = json.loads(texts(notebook.cells[-1]))
    accuracy = {(model, attack): value for model, attack, value in students}
    assert set(accuracy) == set(product(MODELS, ATTACKS))
    assert len(both) == 2 and min(both) > 40
    assert labels_alone > 40
    for (model, attack), value in accuracy.items():
        assert value > (10 if (model, attack) == ("nasty", "KD, T = 20") else 30), (model, attack)
    assert accuracy["protected", "hard labels"] == accuracy["normal", "hard labels"]
