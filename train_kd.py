"""Train a student on the answers of a frozen teacher by an attack: `kd` (Hinton et al., 2015) or another one.

    answers = interface(answer_defense(teacher(x)))
    loss    = attack(student, (x, y), answers)

    kd: alpha * T^2 * KL(softmax(answers / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

    python train_kd.py --save_path experiments/CIFAR10/kd_normal_resnet18/cnn
    python train_kd.py --save_path experiments/CIFAR10/kd_nasty_resnet18/cnn --teacher_resume other/best_model.tar
    python train_kd.py --save_path experiments/mine --set attack=dkd
    python train_kd.py --save_path experiments/mine --set labels=0 alpha=1 queries=once query_budget=1000

Needs the checkpoint of the teacher, `teacher_resume` in params.json. With `trigger` the success of that backdoor on
teacher and student is measured too. The same command resumes an interrupted run.
"""
from __future__ import annotations

from torch import Tensor, nn

import attacks
from backdoor.metrics import measure_backdoor
from defenses.answers import build_answers, overview
from model import build_model
from runs.stages import KD
from utils.cli import main
from utils.data import Batch
from utils.evaluation import Queries
from utils.quality import price
from utils.run import Run


def train_kd() -> None:
    run = Run.from_command_line(KD, build_model, f"{__doc__}\n{overview()}", options=["teacher_resume"])
    params = run.params
    student = run.network()
    once = params.queries == "once"
    answers = build_answers(params, in_order=once and params.views == 1)
    teacher = run.frozen("teacher", answers, Queries(once, params.views))
    attack = attacks.REGISTRY[params.attack].from_run(params, run.dataset.num_classes)
    attack.await_answers(teacher, run.log)
    backdoor = measure_backdoor(run)

    def loss(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        known = batch if params.labeled else batch.without_labels()
        return attack(student, known, teacher(batch))

    final = dict(backdoor.final)
    if teacher.answers:
        final["answers"] = lambda _: price(teacher.network, run.parts["test"], run.dtype, defend=teacher.answers)
    run.train(student, run.supervised(student, loss, attack), metrics=backdoor.metrics, warnings=backdoor.warnings,
              final=final)


if __name__ == "__main__":
    main(train_kd)
