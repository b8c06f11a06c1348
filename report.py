"""Tables of experiments beside the published values, and figures.

    python report.py experiments/demo
    python report.py experiments --out report

Reads the given directories and all below them; the seeds of an experiment are one cell. Prints the tables, and writes
report.md, results.csv and figures to `--out`. Unfinished runs are listed with the commands that finish them; unreadable
files are named and left out. If a figure cannot be drawn, everything else is still written, and the exit status is 2.
"""
from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from reports.document import Report
from utils.cli import main
from utils.errors import UserError


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, default=[Path("experiments")], metavar="DIR",
                        help="experiments, or directories of experiments (default: experiments)")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR",
                        help="output directory (default: report)")
    arguments = parser.parse_args()
    found = Report.of(arguments.directories)
    files, failures = found.write(arguments.out)
    print(found.text())
    print("Written to", textwrap.fill(f"{arguments.out}: {', '.join(file.name for file in files)}.", 109,
                                      break_on_hyphens=False))
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    main(report)
