"""Write runs to disk without training, and read the tables of their reports."""
import json

from reports.document import Report

SCRATCH = {"dataset": "cifar10", "learning_rate": 0.1, "num_epochs": 2}
STAGES = {"method": "train_datafree.py", "teacher_model": "train_kd.py", "adversarial_model": "train_nasty.py",
          "trigger": "train_poisoned.py"}


def write(directory, params, last=None, best=None, **rates):
    """Write an experiment, finished if an accuracy is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    if last is None:
        return
    rows = {name: {"epoch": epoch, "test_accuracy": value, **rates}
            for name, epoch, value in (("last", 2, last), ("best", 1, best or last))}
    stage = next((stage for key, stage in STAGES.items() if key in params), "train_scratch.py")
    (directory / "results.json").write_text(json.dumps({"stage": stage, "params": params, "set": {}, **rows}))
    (directory / "metrics.csv").write_text(f"epoch,test_accuracy\n1,{best or last}\n2,{last}\n")


def teachers(root):
    """Write a normal and a nasty ResNet-18, a baseline, and students of both below `root`."""
    normal, nasty = root / "baseline/resnet18", root / "kd_nasty_resnet18/nasty_resnet18"
    write(normal, SCRATCH | {"model_name": "resnet18"}, 95.0, 95.2)
    write(root / "baseline/cnn", SCRATCH | {"model_name": "net"}, 86.0, 86.5)
    write(nasty, SCRATCH | {"model_name": "resnet18", "adversarial_model": "resnet18", "temperature": 4, "weight": 0.04,
                            "adversarial_resume": f"{normal}/best_model.tar"}, 94.0)
    for kind, teacher, value in (("normal", normal, 87.0), ("nasty", nasty, 82.0)):
        write(root / f"kd_{kind}_resnet18/cnn", student(teacher), value)
    return normal, nasty


def student(teacher, **params):
    return SCRATCH | {"model_name": "net", "teacher_model": "resnet18", "temperature": 4, "alpha": 0.9,
                      "teacher_resume": f"{teacher}/best_model.tar"} | params


def report(*roots):
    return Report.of(roots)


def rows(root, title="Students with data"):
    """Lines of a table as {(row, name of the values): {column: text}}."""
    table = next(table for table in report(root).tables if table.title.startswith(title))
    heads, *lines = table.lines()
    found, row = {}, ""
    for line in lines:
        row = line[0] or row
        found[row, line[1]] = dict(zip(heads[2:], line[2:], strict=True))
    return found
