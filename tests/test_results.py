"""Numbers in the documents equal those of committed and finished runs."""
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMITTED, ROOT

from audits.result import Audit, judge_all
from reports.cells import mean_std
from reports.document import Report
from reports.table import markdown

FULL_LENGTH = Path("docs/results/experiments/CIFAR10")


def unaligned(text):
    """Markdown without alignment spaces, and its rows of single runs, which are in one table."""
    lines = [" ".join(line.split()) for line in text.splitlines() if not line.startswith("|--")]
    return ("\n".join(line for line in lines if not line.startswith("| experiments/")),
            {line for line in lines if line.startswith("| experiments/")})


def last_epoch(run):
    return json.loads((run / "results.json").read_text())["last"]


def last_accuracies(experiment):
    """Test accuracies of seeds 0, 1 and 2 at the last epoch."""
    return [last_epoch(run)["test_accuracy"] for run in (experiment, experiment / "seed1", experiment / "seed2")]


def audit_of_runs(root, directory):
    """Finished audit, after the check that each accuracy is that of a run."""
    audit = Audit.model_validate_json((root / directory / "audit.json").read_text())
    assert audit.finished and not audit.failed
    for student in audit.students:
        for seed, accuracy in student.accuracy.seeds.items():
            assert last_epoch(root / student.accuracy.directory / f"seed{seed}")["test_accuracy"] == accuracy
    return audit


def backdoor_rates(epoch):
    return " | ".join(f"{epoch[key]:.2f}" for key in ("test_accuracy", "asr", "base_rate", "target_recall"))


def test_tables_of_results_md_are_those_of_finished_committed_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, runs = unaligned(Path("docs/results.md").read_text())
    found = set()
    for place in COMMITTED:
        told = Report.of([Path("experiments") / place])
        assert [run.directory for run in told.unfinished] == [] == told.warnings
        assert told.tables
        for table in told.tables:
            assert unaligned(markdown(table.lines()))[0] in text
        found |= unaligned(told.markdown())[1]
    assert runs == found


def test_the_tables_of_attacks_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, _ = unaligned(Path("docs/attacks.md").read_text())
    told = Report.of(place for place in Path("docs/results/experiments/demo").iterdir()
                     if place.name not in ("abd", "audits", "defenses", "triggers"))
    assert [run.directory for run in told.unfinished] == []
    attacks = [table for table in told.tables if table.summary]
    assert len(attacks) == 2 and len(told.sweeps) == 2
    for lines in (*(lines for table in attacks for lines in (table.lines(), table.summary)),
                  *(sweep.table() for sweep in told.sweeps)):
        assert unaligned(markdown(lines))[0] in text


def test_kl_by_epoch_of_results_md_is_that_of_metrics_csv(monkeypatch):
    monkeypatch.chdir(ROOT)
    epochs, seen = [], set()
    for line in Path("docs/results.md").read_text().splitlines():
        name, *cells = line.strip("|").split("|")
        directory = Path(name.strip(" `"))
        if name.strip() == "KL by epoch":
            epochs = list(map(int, cells))
        elif epochs and line.startswith(("| `experiments/", "| `docs/")):
            with open(directory / "metrics.csv") as file:
                terms = {int(row["epoch"]): f"{float(row['kl']):#.3g}".rstrip(".") for row in csv.DictReader(file)}
            assert [cell.strip() for cell in cells] == [terms.get(epoch, "") for epoch in epochs], name
            seen.add(directory)
    places = [*(Path("experiments") / place for place in COMMITTED), FULL_LENGTH / "kd_nasty_net"]
    assert seen == {run.directory for place in places for run in Report.of([place]).runs
                    if run.params.script == "train_nasty.py"}


def test_the_tables_of_the_published_length_in_results_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, _ = unaligned(Path("docs/results.md").read_text())
    told = Report.of(place for place in FULL_LENGTH.iterdir() if place.name != "audits")
    assert [run.directory for run in told.unfinished] == []
    attacks = [table for table in told.tables if table.summary]
    assert len(attacks) == 2 and len(told.tables) == 3 and len(told.sweeps) == 1
    for lines in (*(table.lines() for table in told.tables), *(table.summary for table in attacks),
                  told.sweeps[0].table(), *(price.lines() for price in told.prices)):
        assert unaligned(markdown(lines))[0] in text


def test_the_tables_of_defenses_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, _ = unaligned(Path("docs/defenses.md").read_text())
    told = Report.of(Path("docs/results/experiments/demo") / place for place in ("defenses", "baseline/net16"))
    assert [run.directory for run in told.unfinished] == []
    assert len(told.tradeoffs) == 2 and len(told.prices) == 1
    for table in (*(each.table() for each in told.tradeoffs), told.prices[0].lines()):
        assert unaligned(markdown(table))[0] in text


@pytest.mark.parametrize("document, place", [("README.md", "demo"), ("docs/results.md", "CIFAR10")])
def test_every_number_of_the_committed_audits_is_that_of_a_committed_run(document, place, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = unaligned(Path(document).read_text())[0]
    for kind in ("normal", "nasty"):
        audit = audit_of_runs(Path("docs/results"), f"experiments/{place}/audits/{kind}")
        assert [found.model_dump() for found in judge_all(audit.students, audit.test_images)] == [
            found.model_dump() for found in audit.verdicts]
        for found in audit.verdicts:
            students = {student.attack: student.accuracy for student in audit.students
                        if (student.victim, student.thief) == ("model", found.thief)}
            efficiency = "" if kind == "normal" else \
                "no headroom" if found.efficiency is None else f"{found.efficiency:.2f}"
            row = [kind, found.thief, found.attack, found.accuracy, students["KD, temperature 20"],
                   students["Hard label"], found.labels, efficiency]
            assert " ".join(f"| {' | '.join(map(str, row))} |".split()) in text


def test_the_tables_of_the_example_in_audit_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = unaligned(Path("docs/audit.md").read_text())[0]
    root, own = Path("docs/results/audit_example"), Path("experiments/own")

    def strongest(name):
        verdict, = audit_of_runs(root, own / name).verdicts
        return f"{verdict.accuracy} by {verdict.attack}"
    cells = [strongest(name) for name in ("audit_before", "audit_nasty", "audit_moving")]
    assert f"| unlabeled, all images, logits | {' | '.join(cells)} |" in text
    for weight in ("0.04", "0.08", "0.2"):
        last = last_epoch(root / own / f"nasty_t20_{weight}")
        copy = "not audited" if weight == "0.2" else strongest(f"audit_nasty_t20_{weight}")
        assert f"| {weight} | {last['kl']:.2f} | {last['test_accuracy']:.1f} | {copy}" in text


def test_the_table_of_the_demo_in_backdoors_md_is_that_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    table, = Report.of([Path("docs/results/experiments/demo/abd")]).tables
    lines = [line for line in table.lines() if line[1] != "best epoch"]
    assert unaligned(markdown(lines))[0] in unaligned(Path("docs/backdoors.md").read_text())[0]


def test_the_table_of_thefts_without_data_in_data_free_md_is_that_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, root = unaligned(Path("docs/data_free.md").read_text())[0], Path("docs/results/data_free/experiments/demo")
    teachers = {"normal": "baseline/net16", "nasty": "kd_nasty_net16/nasty_net16"}
    assert "{} (normal) and {}".format(*(mean_std(last_accuracies(root / run)) for run in teachers.values())) in text
    thefts = {"DeepInversion | 20": "kd_{}_net16/deepinversion_net16", "OoD | 4": "kd_{}_net16/ood_net16",
              "DeepInversion | 1": "kd_{}_net16_t1/deepinversion_net16",
              "OoD | 1": "kd_{}_net16_t1/ood_net16",
              "OoD | hard labels": "kd_{}_net16_label/ood_net16"}
    for name, run in thefts.items():
        students = [mean_std(last_accuracies(root / run.format(kind))) for kind in teachers]
        assert f"| {name} | {' | '.join(students)} |" in text


def test_the_table_of_vaccine_weights_is_that_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = unaligned(Path("docs/backdoors.md").read_text())[0]
    runs = {"no vaccine": "abd/ood", "0.1": "ablations/sv_weight/0.1/ood_abd", "0.15": "abd/ood_abd",
            "0.2": "ablations/sv_weight/0.2/ood_abd"}
    for name, run in runs.items():
        last = last_epoch(Path("docs/results/sv_weight/experiments/demo") / run / "seed3")
        assert f"| {name} | {backdoor_rates(last)} |" in text


def test_the_tables_of_all_triggers_in_backdoors_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, root = unaligned(Path("docs/backdoors.md").read_text())[0], Path("docs/results/experiments/demo/triggers")
    students = {"OoD": "ood", "OoD, then no defense": "ood_plain", "OoD + SV": "ood_sv",
                "OoD + searched SV": "ood_auto", "OoD, then SR": "ood_sr", "OoD, then SR, then no defense":
                "ood_sr_plain", "OoD + SV, then SV + SR": "ood_sv_sr"}
    runs = {(trigger, name): [json.loads((place / name / seed / "results.json").read_text())
                              for seed in ("", "seed1", "seed2")]
            for place in root.iterdir() for trigger in [place.name] for name in students.values()}
    assert len(runs) == 11 * 7
    for label, name in students.items():
        own = [run for (_, other), all_seeds in runs.items() if other == name for run in all_seeds]

        def mean(key, part=lambda run: run["last"], own=own):
            return f"{statistics.mean(part(run)[key] for run in own):.1f}"
        rates = [run["last"]["asr"] for run in own]
        numbers = [mean("test_accuracy"), mean("asr"),
                   mean("asr", lambda run: run["details"]["reestimated_batch_norm"]), f"{max(rates):.1f}",
                   f"{sum(rate <= 20 for rate in rates)} of 33", mean("base_rate"), mean("target_recall")]
        assert f"| {label} | {' | '.join(numbers)} |" in text
    controls = {"OoD + SV": "ood_sv", "OoD + SV, then SV": "ood_sv_sv", "OoD + SV, then SV + SR": "ood_sv_sr",
                "OoD, then no defense, then no defense": "ood_plain_plain",
                "OoD, then SR, then no defense": "ood_sr_plain"}
    for label, name in controls.items():
        own = [last_epoch(place / name / seed) for place in root.iterdir() for seed in ("seed1", "seed2")]
        numbers = [f"{statistics.mean(run[key] for run in own):.1f}"
                   for key in ("test_accuracy", "asr", "base_rate", "target_recall")]
        assert f"| {label} | {' | '.join(numbers)} |" in text
    for trigger in {trigger for trigger, _ in runs}:
        cells = [", ".join(f"{run['last']['asr']:.0f}" for run in runs[trigger, name]) for name in students.values()]
        assert f"| {trigger} | {' | '.join(cells)} |" in text


def test_the_asr_of_each_teacher_in_results_md_is_that_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, place = unaligned(Path("docs/results.md").read_text())[0], Path("experiments/CIFAR10_short/abd")
    for name, root, seed in (("0, bfloat16", "", ""), ("1, bfloat16", "", "seed1"),
                             ("2, bfloat16", "", "seed2"), ("0, float32", "docs/results/precision", "")):
        rates = [f"{last_epoch(root / place / run / seed)['asr']:.2f}" for run in ("ood", "ood_sv", "ood_sr")]
        details = json.loads((root / place / "ood_sv" / seed / "results.json").read_text())["details"]
        assert f"| {name} | {' | '.join(rates)} | {details['vaccine']['auc']:.2f} |" in text


def test_the_table_of_vaccine_criteria_is_that_of_the_committed_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = subprocess.run([sys.executable, "benchmarks/vaccine_criteria.py", "--read",
                           "docs/results/vaccine_criteria.csv"], capture_output=True, text=True, check=True)
    assert done.stdout in Path("docs/backdoors.md").read_text()


def test_the_rates_of_the_nasty_poisoned_teacher_in_data_free_md_are_those_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("docs/data_free.md").read_text()
    for run in ("experiments/demo/abd/teacher", "data_free/experiments/mine/continued_poisoned",
                "data_free/experiments/mine/nasty_poisoned", "experiments/demo/abd/ood",
                "data_free/experiments/mine/student"):
        assert f"| {backdoor_rates(last_epoch(Path('docs/results') / run))} |" in text, run


def test_the_table_of_precisions_in_benchmarks_md_is_that_of_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("docs/benchmarks.md").read_text()
    for precision in ("fp32", "bf16"):
        runs = [Path(f"docs/results/precision/experiments/precision/{precision}-{seed}") for seed in range(3)]
        accuracies = [last_epoch(run)["test_accuracy"] for run in runs]
        numbers = [*accuracies, statistics.mean(accuracies), statistics.stdev(accuracies)]
        assert f"| {precision} | {' | '.join(f'{number:.2f}' for number in numbers)} |" in text
