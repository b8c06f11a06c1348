"""The benchmark runs; its timings are not checked."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment


def benchmark(*arguments):
    call = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--device", "cpu", "--workers", "0",
            "--batch_sizes", "4", "--steps", "2", *arguments]
    return subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_writes_every_repeat(tmp_path):
    printed = benchmark("--stages", "evaluate", "--models", "net", "--teacher", "net", "--repeats", "2",
                        "--json", str(tmp_path / "figures.json"))
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["stage"], row["images"]) for row in rows] == [("evaluate", 8)]
    assert all(len(rates) == 2 and min(rates) > 0 for row in rows for rates in row["images_per_second"].values())
    assert all(row["memory_bytes"]["ours"] > 10**8 for row in rows)
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 2


@pytest.mark.slow
def test_the_benchmark_names_the_operations_that_take_the_time():
    printed = benchmark("--stages", "kd_cached", "--models", "net", "--teacher", "net", "--profile")
    assert "ours: kd_cached net" in printed
    assert "usual: kd_cached net" in printed
    assert "convolution_backward" in printed
