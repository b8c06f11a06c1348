"""Report on run directories: report.md, results.csv, figures, and text for the terminal."""
from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import figures
from reports.cells import Cell, Collection, cells, collections, mean_std
from reports.prices import Prices, prices
from reports.sweeps import Sweep, sweeps
from reports.table import Table, format_table, markdown
from reports.tables import tables
from reports.tradeoffs import Tradeoff, tradeoffs
from runs.directories import Run, find
from runs.graph import needs
from utils.errors import UserError
from utils.files import write_text
from utils.results import is_number

MAX_COMMANDS = 20
RATES = ("asr", "triggered_accuracy", "base_rate", "target_recall")


@dataclass(frozen=True)
class Report:
    """Tables, figures and warnings about run directories."""

    collections: Sequence[Collection]
    tables: Sequence[Table]
    sweeps: Sequence[Sweep]
    prices: Sequence[Prices]
    tradeoffs: Sequence[Tradeoff]
    directories: Sequence[Path]  # that were read
    unfinished: Sequence[Run]  # in the order of their dependencies
    warnings: Sequence[str]

    @classmethod
    def of(cls, directories: Iterable[Path]) -> Report:
        """Read the runs at and below directories. Raises UserError if there are none."""
        directories = list(directories)
        runs, warnings = find(directories)
        if not runs:
            raise UserError("; ".join(warnings))
        found, cell_warnings = cells(runs)
        warnings += cell_warnings
        try:
            order = list(needs(runs))
        except UserError as error:
            order = [run.directory for run in runs]
            warnings.append(str(error))
        unfinished = sorted((run for run in runs if not run.finished), key=lambda run: order.index(run.directory))
        groups = collections(found)
        return cls(groups, tables(groups), sweeps(groups), prices(groups), tradeoffs(groups), directories,
                   unfinished, warnings)

    @property
    def cells(self) -> list[Cell]:
        return [cell for collection in self.collections for cell in collection.cells]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @property
    def others(self) -> list[Cell]:
        """Cells that are in no table."""
        placed = {cell.experiment for table in self.tables for cell in table.cells.values()}
        return [cell for cell in self.cells if cell.experiment not in placed]

    @property
    def hidden(self) -> list[Cell]:
        """Finished cells that are in no table, and in no figure except the training curves."""
        swept = {place for sweep in self.sweeps for line in sweep.lines.values() for _, cell in line
                 for place in (cell.experiment, cell.source)}
        return [cell for cell in self.others if cell.finished and cell.experiment not in swept]

    @property
    def commands(self) -> list[str]:
        """Commands that finish the other runs: one per run, teachers first, or one for all if they are many."""
        if len(self.unfinished) > MAX_COMMANDS:
            return [shlex.join(["python", "scripts/run_all.py", *map(str, filter(Path.is_dir, self.directories))])]
        return [run.command for run in self.unfinished]

    def write(self, out: Path) -> tuple[list[Path], list[str]]:
        """Write report.md, results.csv and figures. Returns the files, and a warning per figure that failed."""
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "results.csv", _csv(self))
        write_text(out / "report.md", self.markdown())  # first without figures, which may fail
        figure_files, failures = figures.draw(self.tables, self.tradeoffs, self.sweeps, self.collections, out)
        write_text(out / "report.md", self.markdown(figure_files, failures))
        return [out / "report.md", out / "results.csv", *figure_files], failures

    def markdown(self, figure_files: Sequence[Path] = (), failures: Sequence[str] = ()) -> str:
        """Text of report.md. figure_files: images in the same directory; failures: warnings about missing figures."""
        parts = ["# Results", f"{_progress(self)} {_legend(self)}"]
        for table in self.tables:
            parts += [f"## {table.title}", *format_table(table)]
        for price in self.prices:
            parts += [f"## {price.title}", markdown(price.lines())]
        for tradeoff in self.tradeoffs:
            parts += [f"## {tradeoff.title}", markdown(tradeoff.table())]
        for sweep in self.sweeps:
            parts += [f"## {sweep.title}", markdown(sweep.table())]
        if self.commands:
            parts += ["## Not finished", "```bash\n" + "\n".join(self.commands) + "\n```"]
        if self.hidden:
            parts += ["## In no table", "\n".join(f"- {cell.experiment}: {cell.network}, last epoch "
                                                  f"{mean_std(cell.values('last').values())}" for cell in self.hidden)]
        if done := [run for run in self.runs if run.finished]:
            parts += ["## Finished runs", markdown(_runs(done))]
        if figure_files:
            parts += ["## Figures", *(f"![{file.stem}]({file.name})" for file in figure_files)]
        if texts := [*_all_warnings(self), *failures]:
            parts += ["## Remarks", "\n".join(f"- {text}" for text in texts)]
        return "\n\n".join(parts) + "\n"

    def text(self) -> str:
        """Text for the terminal: tables with finished runs, and a summary of the remainder."""
        blocks = ["\n\n".join([table.title, *format_table(table)]) for table in self.tables if table.finished]
        blocks += [f"{price.title}\n\n{markdown(price.lines())}" for price in self.prices]
        blocks += [f"{tradeoff.title}\n\n{markdown(tradeoff.table())}" for tradeoff in self.tradeoffs]
        blocks += [f"{sweep.title}\n\n{markdown(sweep.table())}" for sweep in self.sweeps]
        if idle := [table.title for table in self.tables if not table.finished]:
            blocks.append("Nothing finished yet in: " + "; ".join(idle) + ".")
        if self.hidden:
            blocks.append(f"In no table: {', '.join(str(cell.experiment) for cell in self.hidden)}.")
        blocks += [textwrap.fill(_legend(self), 120),
                   _progress(self) + " report.md has the commands of the others." * bool(self.unfinished)]
        return "\n\n".join(blocks) + "".join(f"\nremark: {text}" for text in _all_warnings(self))


def _legend(report: Report) -> str:
    """Explanation of the tables."""
    texts = ["Percent of the test images; mean ± standard deviation if there are several seeds."]
    if any(table.references for table in report.tables):
        texts.append("In parentheses, differences by seed: a student minus the same network without a teacher, a "
                     "teacher minus the normal one.")
    if any("asr" in table.keys for table in report.tables if table.finished):
        texts.append("Attack success rate: images of other classes that are classified as the target with the trigger; "
                     "base rate: without the trigger. Target recall: images of the target classified as the target. "
                     "Re-estimated batch norm: the last epoch, with new running statistics of the method's images.")
    if any(table.summary for table in report.tables):
        texts.append("Controls: the same attack on answers that do not depend on the image; their gain is label "
                     "smoothing, not theft. The strongest attack is the best of those tried, which favors the thief. "
                     "Headroom: the strongest attack on the normal teacher minus its floor (the student of hard labels "
                     "or, for a thief with labels, the best student without a teacher); no headroom if it is within "
                     "the standard deviation over seeds. Efficiency: the fraction of the headroom that a defense "
                     "takes; above 1, its students are below the normal teacher's floor.")
    if report.prices:
        texts.append("Price and profile: `python evaluate.py --help` defines the columns; L1 change and rank "
                     "correlation compare with the normal teacher or, behind an answer defense, with the network's "
                     "own answers.")
    if report.tradeoffs:
        texts.append("Protection and its price: a teacher's accuracy is that of the answers that clients get; a good "
                     "defense keeps it high and the strongest attack's student low. The floor is the student of hard "
                     "labels; an answer defense that keeps the top class does not change it, but a trained-in defense "
                     "has other top classes.")
    texts.append("The best epoch is selected on the test images (unless `validation_fraction` is set), so it is "
                 "optimistic.")
    if not all(run.finished for run in report.runs):
        texts.append("`–`: not run yet; `epoch N`: not finished.")
    if any(table.published for table in report.tables):
        texts.append("Published values were not checked against the papers.")
    return " ".join(texts)


def _progress(report: Report) -> str:
    total = len(report.runs)
    return f"{sum(run.finished for run in report.runs)} of {total} {'run is' if total == 1 else 'runs are'} finished."


def _all_warnings(report: Report) -> list[str]:
    changed = [(run, run.results.set) for run in report.runs if run.results and run.results.set]
    return [*report.warnings, *(f"{run.directory}: run with --set " + " ".join(
        f"{key}={json.dumps(value)}" for key, value in values.items()) for run, values in changed)]


def _runs(runs: Sequence[Run]) -> list[list[str]]:
    """Header, then one row per run: accuracy, time, device and versions."""
    lines = [["run", "last epoch", "best epoch", "time", "device", "arithmetic", "torch", "commit"]]
    for results, run in ((run.results, run) for run in runs):
        if results is None:
            continue
        accuracies = [f"{row['test_accuracy']:.2f} ({row['epoch']:.0f})" for row in (results.last, results.best)]
        lines.append([str(run.directory), *accuracies, _duration(results.wall_time_seconds), results.device,
                      results.precision, str(results.versions.get("torch", "")),
                      str(results.versions.get("commit") or "")[:7]])
    return lines


def _duration(seconds: object) -> str:
    if not is_number(seconds):
        return ""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36_000 else \
        f"{seconds / 3600:.1f} h"


def _csv(report: Report) -> str:
    """Text of results.csv: one line per cell of each table, and per cell that is in no table."""
    heads = ["table", "row", "column", "experiment", "dataset", "network", "kind", "teacher", "method", "answers",
             "trigger", "runs", "finished", *(f"{epoch}_{key}{what}" for epoch in ("last", "best")
                                   for key in ("test_accuracy", *RATES) for what in ("", "_sd")), "published",
             "published_asr"]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n", restval="")
    writer.writeheader()
    for table in report.tables:
        for place in dict.fromkeys([*table.cells, *table.published]):
            row: dict[str, object] = {"table": table.title, "row": place.row.label, "column": place.column.label}
            row |= dict(zip(("published", "published_asr"), table.published.get(place, ()), strict=False))
            writer.writerow(row | (_measured(table.cells[place]) if place in table.cells else {}))
    for cell in report.others:
        writer.writerow(_measured(cell))
    return text.getvalue()


def _measured(cell: Cell) -> dict[str, object]:
    row: dict[str, object] = {
        "experiment": cell.experiment, "dataset": cell.params["dataset"], "network": cell.network, "kind": cell.kind,
        "teacher": f"{cell.teacher_kind} {cell.teacher}" if cell.teacher else "",
        "method": " ".join(cell.student_method) or cell.description.method, "answers": cell.answers,
        "trigger": cell.params.get("trigger") or "",
        "runs": len(cell.runs), "finished": len(cell.finished)}
    for epoch in ("last", "best"):
        for key in ("test_accuracy", *RATES):
            if values := list(cell.values(epoch, key).values()):
                row[f"{epoch}_{key}"] = round(statistics.mean(values), 4)
                row[f"{epoch}_{key}_sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else ""
    return row
