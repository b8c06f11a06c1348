"""Reports: what is printed and written; damaged files do not stop a report."""
import csv
import io
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from report_helpers import SCRATCH, report, rows, student, teachers, write

from report import report as print_report
from reports import figures
from reports.cells import network_display_name
from reports.table import markdown
from utils.cli import main


def test_unfinished_runs_are_listed_with_their_commands(tmp_path):
    _, nasty = teachers(tmp_path)
    for directory in (nasty, tmp_path / "kd_nasty_resnet18/cnn"):
        (directory / "results.json").unlink()
    (tmp_path / "kd_nasty_resnet18/cnn/metrics.csv").unlink()
    told = report(tmp_path)
    found = rows(tmp_path)
    assert found["nasty ResNet-18", "last epoch"]["teacher"] == "epoch 2"
    assert found["nasty ResNet-18", "last epoch"]["CNN"] == "–"
    assert told.commands == [f"python train_nasty.py --save_path {nasty}",
                             f"python train_kd.py --save_path {tmp_path}/kd_nasty_resnet18/cnn"]
    assert all(command in told.markdown() for command in told.commands)


def test_many_unfinished_runs_have_one_command(tmp_path):
    teachers(tmp_path)
    for number in range(30):
        write(tmp_path / f"baseline/other{number}", SCRATCH | {"model_name": "net"})
    assert report(tmp_path).commands == [f"python scripts/run_all.py {tmp_path}"]


def test_runs_in_no_table_and_no_figure_are_named(tmp_path):
    _, nasty = teachers(tmp_path)
    write(tmp_path / "ablations/alpha/0.1/nasty_cnn", student(nasty, alpha=0.1), 80.0)
    write(tmp_path / "baseline/cnn_long", SCRATCH | {"model_name": "net", "num_epochs": 9}, 87.0)
    told = report(tmp_path)
    assert [cell.experiment.name for cell in told.hidden] == ["nasty_cnn", "cnn_long"]
    assert "ablations/alpha/0.1/nasty_cnn" in told.text()


def test_networks_have_the_names_of_the_papers():
    assert network_display_name("preresnet32") == "ResNetC-32" and network_display_name("net16") == "CNN, 16 channels"


def test_a_markdown_table_is_aligned():
    assert markdown([["a", "bcd"], ["ef", ""]]).splitlines() == ["| a  | bcd |", "|----|-----|", "| ef |     |"]


def call(*arguments, cwd):
    return subprocess.run([sys.executable, str(ROOT / "report.py"), *map(str, arguments)], capture_output=True,
                          text=True, cwd=cwd, env=environment())


def test_a_report_is_written_and_printed(tmp_path):
    teachers(tmp_path / "experiments")
    done = call(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "82.00 (-4.00)" in done.stdout and "5 of 5 runs are finished" in done.stdout
    text = (tmp_path / "report/report.md").read_text()
    assert "## Students with data, CIFAR-10" in text and "![curves-cifar10](curves-cifar10.png)" in text
    assert len(list((tmp_path / "report").glob("*.png"))) == 2
    with open(tmp_path / "report/results.csv") as file:
        lines = {(line["row"], line["column"]): line for line in csv.DictReader(file)}
    line = lines["nasty ResNet-18", "CNN"]
    assert (line["last_test_accuracy"], line["published"], line["finished"]) == ("82.0", "82.46", "1")
    assert line["experiment"] == "experiments/kd_nasty_resnet18/cnn"


def test_figures_have_distinct_file_names():
    texts = ["x-y", "x y", "X Y", "x_y", "x-y-2", "x y", "猫", "犬", "z" * 200, "z" * 200 + "!"]
    names = figures._file_names(f"students folder:{text}" for text in texts)
    assert len({name.lower() for name in names}) == len(texts)
    assert all(name.isascii() and len(name) <= 110 for name in names)
    assert names[:2] == ["students-folder-x-y", "students-folder-x-y-2"]


def test_names_are_drawn_literally(tmp_path):
    for name in ("_a$x_{", "b$\\frac$"):
        write(tmp_path / name, SCRATCH | {"model_name": "net", "dataset": "folder:$\\c_{"}, 80.0)
    told = report(tmp_path)
    figure = figures._training_curves("$\\c_{", told.cells)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        f"{tmp_path.name}/_a$x_{{", f"{tmp_path.name}/b$\\frac$"]
    assert not any(text.get_parse_math() for text in figure.findobj(lambda artist: hasattr(artist, "get_parse_math")))
    assert told.write(tmp_path / "out")[1] == []


@pytest.fixture
def printed(monkeypatch):
    """`printed(function, encoding)`: output on a terminal with an encoding, and exit status."""
    def run(function, encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", stream)
            main(function)
        stream.flush()
        return stream.buffer.getvalue().decode(encoding), end.value.code
    return run


def test_a_failed_figure_does_not_stop_the_report(tmp_path, monkeypatch, printed, capsys):
    def fail(_):
        raise ValueError("cannot draw this\nmore")

    teachers(tmp_path / "experiments")
    monkeypatch.setattr(figures, "_bar_plot", fail)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "experiments"), "--out", str(tmp_path / "out")])
    text, status = printed(print_report, "utf-8")
    assert "82.00 (-4.00)" in text and status == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out/students-cifar10.png was not drawn: cannot draw this\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "results.csv", "curves-cifar10.png"}
    assert "- " + str(tmp_path / "out/students-cifar10.png") in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(("encoding", "text"), [
    ("utf-8", "1 ± 2 – é 猫 \\udcb9"), ("cp1252", "1 ± 2 – é \\u732b \\udcb9"),
    ("latin-1", "1 ± 2 - é \\u732b \\udcb9"), ("ascii", "1 +- 2 - \\xe9 \\u732b \\udcb9")])
def test_characters_that_the_terminal_cannot_show_are_replaced(printed, encoding, text):
    assert printed(lambda: print("1 ± 2 – é 猫 \udcb9"), encoding) == (text + "\n", 0)


def test_a_directory_whose_name_is_not_utf8_is_reported(tmp_path):
    for name in ("a\udcb9", "b"):
        write(tmp_path / name / "baseline/net", SCRATCH | {"model_name": "net"}, 80.0)
        write(tmp_path / name / "baseline/_\udcb9", SCRATCH | {"model_name": "net", "num_epochs": 3}, 80.0)
    files, failures = report(tmp_path).write(tmp_path / "out")
    assert "a\\udcb9" in files[0].read_text(encoding="utf-8") and not failures


def test_a_history_that_a_spreadsheet_saved_is_read(tmp_path):
    write(tmp_path / "run", SCRATCH | {"model_name": "net"}, 80.0)
    (tmp_path / "run/metrics.csv").write_bytes(b"\xef\xbb\xbfepoch,test_accuracy\r\n1,70\r\n")
    told = report(tmp_path)
    assert told.runs[0].history == [{"epoch": 1, "test_accuracy": 70}] and not told.warnings


def test_a_finished_run_with_overrides_is_read(tmp_path):
    teachers(tmp_path)
    place = tmp_path / "baseline/cnn"
    results = json.loads((place / "results.json").read_text())
    (place / "results.json").write_text(json.dumps(results | {"set": {"model_name": "net"}}))
    (place / "params.json").write_text(json.dumps(SCRATCH))
    assert rows(tmp_path)["no teacher", "last epoch"]["CNN"] == "86.00"


def test_damaged_files_are_named_and_do_not_stop_the_report(tmp_path):
    teachers(tmp_path / "good")
    for name, file, content in (("json", "params.json", b"{"), ("text", "params.json", b"\xff\xfe\x00"),
                                ("list", "params.json", b"[]"), ("foreign", "params.json", b'{"lr": 0.1}')):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / file).write_bytes(content)
    for name, file, content in (("cut", "results.json", b'{"best": {'), ("other", "results.json", b'{"best": 3}'),
                                ("rows", "metrics.csv", b"epoch,test_accuracy\n1,80\n2,x\n"),
                                ("binary", "metrics.csv", b"\x00\xff\n\x00"),
                                ("short", "metrics.csv", b"epoch,test_accuracy,kl\n1,80\n"),
                                ("none", "results.json", b'{"stage": "train_scratch.py", "params": {}, '
                                 b'"best": {"epoch": 1, "test_accuracy": 8}, '
                                 b'"last": {"epoch": 1, "test_accuracy": 8}}'),
                                ("huge", "results.json", b'{"best": {"epoch": 1, "test_accuracy": 1' + b"0" * 400
                                 + b"}}"),
                                ("half", "results.json", b'{"device": "\\ud800"}'),
                                ("deep", "results.json", b"[" * 100_000)):
        write(tmp_path / "bad" / name, SCRATCH | {"model_name": "net"}, 80.0)
        (tmp_path / "bad" / name / file).write_bytes(content)
    (tmp_path / "bad/folder/params.json").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    done = call("good", "bad", "empty", "file", "nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "82.00 (-4.00)" in done.stdout
    for words in ("bad/json/params.json, line 1, column 2: not valid JSON", "bad/text/params.json is not a text file",
                  "bad/list/params.json: expected a JSON object", "bad/foreign/params.json is not of an experiment",
                  "bad/cut/results.json, line 1, column 11: not valid JSON", "bad/other/results.json",
                  "bad/rows/metrics.csv is damaged",
                  "bad/binary/metrics.csv is damaged", "bad/short/metrics.csv is damaged after 0 rows",
                  "bad/none/results.json has other parameters", "bad/deep/results.json: brackets are nested too deeply",
                  "bad/huge/results.json has no accuracy", "bad/half/results.json has half a surrogate pair",
                  "bad/folder/params.json: Is a directory", "empty: no params.json",
                  "file: is no directory", "nowhere: does not exist"):
        assert words in done.stdout, words


def test_a_reader_may_close_the_pipe_early(tmp_path):
    teachers(tmp_path)
    command = f"{sys.executable} {ROOT / 'report.py'} {tmp_path} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stderr) == (141, "")


def test_a_report_without_experiments_is_one_line(tmp_path):
    done = call("nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: nowhere: does not exist\n")
