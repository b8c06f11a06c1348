"""Figures of an audit: heat maps of attacks and answers, and accuracy against the number of images."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audits.plan import slug
from audits.result import Audit, Student
from reports.plots import drawable, heat_map, legend, plt, save


def draw(audit: Audit, out: Path) -> list[Path]:
    """Draw a heat map per network and thief, and curves if there are several numbers of images. Returns the files."""
    made = []
    for network, thief in dict.fromkeys((each.network, each.thief) for each in audit.verdicts):
        students = [each for each in audit.students if each.network == network and each.thief == thief
                    and each.victim != "none"]
        file = out / f"attacks_{network}_{slug(thief)}.png"
        save(_heat(students, f"{thief} thief, student {network}: test accuracy, %"), file)
        made.append(file)
        budgets = {each.images for each in students}
        if len(budgets) > 1:
            curves = out / f"budget_{network}_{slug(thief)}.png"
            save(_curves(audit, network, thief), curves)
            made.append(curves)
    return made


def _heat(students: Sequence[Student], title: str) -> plt.Figure:
    columns = list(dict.fromkeys((each.images, each.victim, each.answers if each.victim == "model" else "")
                                 for each in sorted(students, key=lambda each: (
                                     each.images or 10**9, ("unprotected", "model", "control").index(each.victim)))))
    attacks = list(dict.fromkeys(each.attack for each in students))
    found = {(each.attack, each.images, each.victim, each.answers if each.victim == "model" else ""):
             each.accuracy.mean for each in students}
    values = [[found.get((attack, *column), float("nan")) for column in columns] for attack in attacks]
    several = len({images for images, *_ in columns}) > 1
    victims = {"model": "audited model", "unprotected": "unprotected model", "control": "control"}
    column_labels = [", ".join(filter(None, [victims[victim], answers, several * (
        f"{images:,} images" if images else "all images")])) for images, victim, answers in columns]
    return heat_map(attacks, column_labels, values, title,
                    bold=[at for at, (_, victim, _) in enumerate(columns) if victim != "control"])


def _curves(audit: Audit, network: str, thief: str) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 5))
    verdicts = [each for each in audit.verdicts if each.network == network and each.thief == thief]
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for each in verdicts:
        x = each.count
        for name, mean_std in ((f"strongest attack, {each.answers}", each.accuracy),
                             (f"hard labels, {each.answers}", each.hard_label),
                             ("strongest attack, unprotected", each.unprotected), ("labels alone", each.labels)):
            if mean_std and x not in [point[0] for point in lines.get(name, ())]:
                lines.setdefault(name, []).append((x, mean_std.mean, mean_std.sd or 0.0))
    handles = []
    for (name, points), marker in zip(lines.items(), "osD^vPX*" * len(lines), strict=False):
        xs, means, deviations = zip(*sorted(points), strict=True)
        style = "--" if name.startswith("hard") else ":" if name == "labels alone" else "-"
        handles.append(axes.errorbar(xs, means, yerr=deviations if any(deviations) else None, marker=marker, capsize=3,
                                     linestyle=style)[0])
    axes.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x, *_ in points})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel("number of images that the thief sends")
    axes.set_ylabel("test accuracy of the student, %")
    axes.set_title(drawable(f"{thief} thief, student {network}"), fontsize=11, loc="left")
    legend(axes, handles, list(lines), fontsize=10)
    return figure
