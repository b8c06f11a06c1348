"""Tables of any number of experiments, beside the published values, and figures.

    python report.py experiments/demo
    python report.py experiments --out report

Reads the directories named and all below them, several seeds of one experiment as one cell, prints the tables, and
writes report.md, results.csv and figures to `--out`. Unfinished runs are shown as such, with the commands that finish
them; what cannot be read is named and left out. A figure that cannot be drawn costs nothing else: the exit status is 2
in the end.
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
                        help="experiments, or directories of them (default: experiments)")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report")
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
