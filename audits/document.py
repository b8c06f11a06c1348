"""Render an audit as audit.md, audit.csv and a summary for the terminal."""
from __future__ import annotations

import csv
import io
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from attacks import REGISTRY
from audits.plan import Plan
from audits.progress import duration
from audits.result import Audit, MeanStd, Student, ThiefVerdict
from reports.prices import COLUMNS
from reports.table import markdown
from runs.audits import LABELED, NO_DATA, UNLABELED, AuditParams

WIDTH = 118
MAX_LINES, MAX_VERDICTS, MAX_PRICES = 40, 12, 8  # on the terminal
HAS = {LABELED: "training images with their labels", UNLABELED: "training images without labels",
       NO_DATA: "patches of one generated image, and no image of the data set"}
SHOWN_PRICES = ("accuracy", "cross_entropy", "calibration_error", "risk_coverage_area", "l1_change", "entropy",
                "non_target_mass", "cmi", "rank_correlation")


def terminal(audit: Audit, directory: Path) -> str:
    """Summary for the terminal: at most 40 lines, not counting the names of the files."""
    texts = (_terminal(audit, directory, max_verdicts) for max_verdicts in range(MAX_VERDICTS, 0, -1))
    return next((text for text in texts if text.count("\n") < MAX_LINES), _terminal(audit, directory, 1))


def _terminal(audit: Audit, directory: Path, max_verdicts: int) -> str:
    """max_verdicts: maximum number of verdicts shown."""
    shown = sorted(audit.verdicts, key=lambda found: -(found.headroom_left or 0))[:max_verdicts]
    verdicts = [found for found in audit.verdicts if found in shown]
    more = len(audit.verdicts) - len(verdicts)
    blocks = [_headline(audit), markdown(_verdict_lines(verdicts, _networks(audit)))]
    blocks += [f"{more} verdicts with less headroom are in {directory / 'audit.md'}."] * bool(more)
    blocks.append("\n".join(textwrap.fill(f"{thief_label}: {sentence}.", WIDTH, subsequent_indent="  ")
                            for thief_label, sentence in _sentences(audit, verdicts)))
    prices = _price_lines(audit)
    blocks.append(markdown(prices[:MAX_PRICES + 1]) + f"\n{len(prices) - 1 - MAX_PRICES} more rows are in "
                  f"{directory / 'audit.md'}." * (len(prices) > MAX_PRICES + 1))
    blocks.append(textwrap.fill(
        "The strongest attack is the best of those tried, which favors the thief; another attack, more images or "
        "longer training may get more. Differences within the margin are not significant; more seeds and test images "
        "reduce the margin. " + _failures(audit), WIDTH))
    return "\n\n".join(blocks)


def document(audit: Audit, params: AuditParams, directory: Path, figure_files: Sequence[Path] = ()) -> str:
    """Text of audit.md."""
    parts = [f"# Audit of {params.checkpoint}", _headline(audit), "## Verdict",
             markdown(_verdict_lines(audit.verdicts, _networks(audit))),
             "\n".join(f"- {thief_label}: **{sentence}**."
                       for thief_label, sentence in _sentences(audit, audit.verdicts)),
             _LEGEND]
    parts += [f"![{file.stem}]({file.name})" for file in figure_files]
    parts += ["## Price and profile", _PRICE, markdown(_price_lines(audit, brief=False))]
    parts += ["## Threat model", _threat(audit, params)]
    parts += ["## Students", "Test accuracy at the last epoch, percent, mean ± standard deviation over the seeds. "
              "Controls: the same attack on answers that do not depend on the image (uniform, or class means if the "
              "attack reads the top class)."]
    for title, lines in _student_tables(audit):
        parts += [f"### {title}", markdown(lines)]
    parts += ["## Not tried", *([_not_tried(audit)] if audit.not_tried else ["All attacks were tried."])]
    if audit.failed:
        parts += ["## Failed", "\n".join(f"- `{name}`" for name in audit.failed)]
    parts += ["## Limits of these numbers", markdown(_limits(audit, params))]
    parts += ["## Provenance", _provenance(audit, directory)]
    if audit.remarks:
        parts += ["## Remarks", "\n".join(f"- {text}" for text in audit.remarks)]
    return "\n\n".join(parts) + "\n"


_PRICE = ("Metrics of the answers to the test images. Price, for clients: accuracy, ECE and AURC (area under the "
          "risk-coverage curve) in percent, cross-entropy in nats. Profile, for a student: entropy, CMI (conditional "
          "mutual information given the class) and separation of the classes in nats, non-target mass in percent, "
          "number of peaks. L1 change and rank correlation compare with the unprotected model or, without one, with "
          "the model's own probabilities. `python evaluate.py --help` defines the metrics.")


def table(audit: Audit, plan: Plan) -> str:
    """Text of audit.csv: one line per run, with its directory and its command."""
    heads = ["network", "images", "thief", "victim", "answers", "attack", "seed", "test_accuracy", "directory",
             "command"]
    scripts = {attempt.directory.as_posix(): attempt.stage.script for attempt in plan.attempts}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for each in audit.students:
        for seed, accuracy in each.accuracy.seeds.items():
            place = f"{each.accuracy.directory}/seed{seed}"
            script = scripts[each.accuracy.directory]
            writer.writerow([each.network, each.images or "all", each.thief, each.victim, each.answers, each.attack,
                             seed, accuracy, place, f"python {script} --save_path {shlex.quote(place)}"])
    return text.getvalue()


def comparison(audits: Sequence[tuple[str, Audit]]) -> str:
    """Markdown table of several (directory, audit): the strongest attack, the accuracy of its student, and the
    price."""
    kinds = dict.fromkeys((found.network, found.images, found.thief, found.answers)
                          for _, audit in audits for found in audit.verdicts)
    lines = [["thief", *(name for name, _ in audits)]]
    for network, images, thief, answers in kinds:
        found = [audit.verdict(thief, answers, images, network) for _, audit in audits]
        thief_label = next(_thief_label(each, _networks(*(audit for _, audit in audits))) for each in found if each)
        lines.append([thief_label, *(f"{each.accuracy} by {each.attack}" if each else "not tried" for each in found)])
        lines.append(["- above the floor", *(f"{each.headroom_left:+.2f}" if each and each.headroom_left is not None
                                               else "" for each in found)])
    for key in SHOWN_PRICES:
        values = [audit.prices["logits"].get(key) for _, audit in audits]
        if any(value is not None for value in values):
            head, digits = COLUMNS[key]
            lines.append([f"price: {head}" if key in SHOWN_PRICES[:5] else f"profile: {head}",
                          *("" if value is None else f"{value:.{digits}f}" for value in values)])
    return markdown(lines)


def _headline(audit: Audit) -> str:
    params = audit.params
    accuracy = audit.prices["logits"]["accuracy"]
    state = "" if audit.finished else " NOT FINISHED: run the same command to continue."
    seeds = ", ".join(map(str, params["seeds"]))
    of_seeds = ", mean ± standard deviation" * (len(params["seeds"]) > 1)
    return textwrap.fill(
        f"{params['checkpoint']}: {params['model_name']} on {params['dataset']}, {accuracy:.2f} % of "
        f"{audit.test_images:,} test images. {audit.runs} students, seed{'s' * (len(params['seeds']) > 1)} {seeds}, "
        f"{duration(audit.seconds)} of training in all. Test accuracies at the last epoch, percent{of_seeds}.{state}",
        WIDTH)


def _thief_label(found: ThiefVerdict, networks: int) -> str:
    """`unlabeled, 1,000 images, mad:0.5`, and the student's network if there are several."""
    images = f"{found.images:,} images" if found.images else "" if found.thief == NO_DATA else "all images"
    return ", ".join(filter(None, [found.thief, images, found.answers, found.network if networks > 1 else ""]))


def _sentences(audit: Audit, verdicts: Iterable[ThiefVerdict]) -> list[tuple[str, str]]:
    return [(_thief_label(found, _networks(audit)), found.sentence) for found in verdicts]


def _networks(*audits: Audit) -> int:
    return len({found.network for audit in audits for found in audit.verdicts})


def _verdict_lines(verdicts: Iterable[ThiefVerdict], networks: int) -> list[list[str]]:
    """networks: number of different student networks."""
    heads = ["thief", "strongest attack", "its student", "labels alone", "smoothed", "hard labels", "unprotected",
             "control", "headroom", "left", "efficiency", "margin"]
    lines = [heads]
    for found in verdicts:
        accuracies = [found.accuracy, found.labels, found.label_smoothing, found.hard_label, found.unprotected,
                      found.control]
        efficiency = "" if found.unprotected is None or found.headroom is None else \
            "no headroom" if found.efficiency is None else f"{found.efficiency:.2f}"
        lines.append([_thief_label(found, networks), found.attack, *map(_text, accuracies), _points(found.headroom),
                      _points(found.headroom_left), efficiency, f"{found.margin:.2f}"])
    kept = [at for at in range(len(heads)) if at < 3 or any(line[at] for line in lines[1:])]
    return [[line[at] for at in kept] for line in lines]


def _text(mean_std: MeanStd | None) -> str:
    return str(mean_std) if mean_std else ""


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _price_lines(audit: Audit, *, brief: bool = True) -> list[list[str]]:
    keys = [key for key in (SHOWN_PRICES if brief else [*COLUMNS, "foreign_auroc"])
            if any(key in row for row in audit.prices.values())]
    heads = {**COLUMNS, "foreign_auroc": ("foreign AUROC, %", 2)}
    return [["clients get", *(heads[key][0] for key in keys)],
            *([name, *(f"{row[key]:.{heads[key][1]}f}" if key in row else "" for key in keys)]
              for name, row in audit.prices.items())]


def _student_tables(audit: Audit) -> Iterable[tuple[str, list[list[str]]]]:
    """One table per network, number of images and thief: one row per attack, one column per kind of answers."""
    groups: dict[tuple[str, int | None, str], list[Student]] = {}
    for each in audit.students:
        if each.victim != "none":
            groups.setdefault((each.network, each.images, each.thief), []).append(each)
    for (network, images, thief), students in groups.items():
        columns = dict.fromkeys(_column(each) for each in students)
        lines = [["attack", *columns]]
        for attack in dict.fromkeys(each.attack for each in students):
            found = {_column(each): each for each in students if each.attack == attack}
            lines.append([attack, *(str(found[column].accuracy) if column in found else "" for column in columns)])
        for each in audit.students:
            if each.victim == "none" and (each.network, each.images) == (network, images):
                lines.append([f"no teacher: {each.attack}", str(each.accuracy), *[""] * (len(columns) - 1)])
        of = f"{images:,} images" if images else "all images"
        yield f"{network}, {thief}, {'patches' if thief == NO_DATA else of}", lines


def _column(student: Student) -> str:
    return f"model: {student.answers}" if student.victim == "model" else student.victim


_LEGEND = (
    "The strongest attack is the best of those tried: the more attacks, the more chance inflates its accuracy, which "
    "favors the thief. *Labels alone* and *smoothed*: the same network trained on the same images and their labels, "
    "without and with label smoothing. *Hard labels*: the best of all students that only use the model's top classes, "
    "at any interface; a defense that keeps the top classes cannot push a thief below it. *Unprotected*: the strongest "
    "attack on the unprotected model or, without one, on this model's logits. *Floor*: hard labels or, for a thief "
    "with labels, the better of labels alone and smoothed. *Headroom*: unprotected minus the unprotected model's "
    "floor; below 0, the answers are worth less than what the thief has already. *Left*: the strongest attack minus "
    "this model's own floor. *Efficiency*: (unprotected - strongest attack) / headroom, the fraction of the headroom "
    "that protection takes; above 1, the best student is below the unprotected model's floor; no headroom: the "
    "strongest attack on the unprotected model does not exceed its floor and its control by more than the margin. "
    "*Control*: for an attack that reads labels, the same attack on answers that do not depend on the image. *Margin*: "
    "smaller differences are noise; it is the standard deviation over seeds or the standard error of a difference on "
    "this number of test images and seeds, whichever is larger.")


def _threat(audit: Audit, params: AuditParams) -> str:
    thieves = dict.fromkeys(found.thief for found in audit.verdicts)
    lines = ["A client copies the model by training another network on its answers. Thieves know the classes, the "
             "image size, the normalization and which attack to use; they do not see weights, gradients or "
             "features."]
    for thief in thieves:
        sends = "new mixtures of patches in every epoch" if thief == NO_DATA else "each once and stores the answers"
        has = HAS.get(thief, f"images of {thief}, another data set")
        lines.append(f"- *{thief}*: has {has}; sends {sends}.")
    answers = dict.fromkeys(found.answers for found in audit.verdicts)
    lines.append(f"- Answers: {', '.join(answers)}.")
    lines.append("- Student networks: " + ", ".join(dict.fromkeys(found.network for found in audit.verdicts))
                 + f"; trained for {params.num_epochs} epochs on all images, or up to five times as many on fewer "
                 "images.")
    return "\n".join(lines)


def _not_tried(audit: Audit) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in audit.not_tried.items():
        reasons.setdefault(reason, []).append(REGISTRY.entry(name).display_name)
    return "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items())


def _limits(audit: Audit, params: AuditParams) -> list[list[str]]:
    lines = [["limit", "consequence"],
             ["only these attacks", "another attack, such as one of those not tried, may get more"],
             ["one recipe for all students", f"{params.num_epochs} epochs (more on fewer images) at learning rate "
                                             f"{params.learning_rate:g}; a thief who tunes or trains longer may get "
                                             "more"],
             ["these networks", "a larger or pretrained student may get more"],
             ["these images", "a thief with more or better images may get more; add budgets or data sets"],
             ["a maximum of noisy numbers", "chance inflates the accuracy of the strongest of many attacks"],
             ["the test set of this data set", "accuracy and leakage differ on other images"],
             ["copies only", "membership inference, adversarial examples made with the copy, and detection of copies "
                             "are not measured"]]
    if len(params.seeds) == 1:
        lines.append(["one seed", "another seed may change a number by a point"])
    return lines


def _provenance(audit: Audit, directory: Path) -> str:
    versions = audit.versions
    lines = [f"- `python audit.py --save_path {shlex.quote(str(directory))}` with the parameters in audit.json; "
             "the command of each run is in audit.csv.",
             f"- model: `{audit.model['path']}`, SHA-256 `{audit.model['sha256']}`"]
    if audit.unprotected:
        lines.append(f"- unprotected: `{audit.unprotected['path']}`, SHA-256 `{audit.unprotected['sha256']}`")
    queries = ", ".join(f"{count:,}" for count in audit.queries)
    lines += [f"- queries per run: {queries or 'none counted'}",
              f"- commit {versions.get('commit') or 'unknown'}, torch {versions.get('torch')}, torchvision "
              f"{versions.get('torchvision')}, Python {versions.get('python')}"]
    return "\n".join(lines)


def _failures(audit: Audit) -> str:
    return f"{len(audit.failed)} runs failed: {', '.join(audit.failed[:3])}." if audit.failed else ""
