"""Distil a student from a frozen teacher, normal or nasty (Hinton et al., 2015).

    loss = alpha * T^2 * KL(softmax(teacher(x) / T) || softmax(student(x) / T)) + (1 - alpha) * CE(student(x), y)

    python train_kd.py --save_path experiments/CIFAR10/kd_normal_resnet18/cnn
    python train_kd.py --save_path experiments/CIFAR10/kd_nasty_resnet18/cnn --teacher_resume other/best_model.tar

Needs the teacher's checkpoint, `teacher_resume` of params.json. With a `trigger` the success of that backdoor on
teacher and student is measured too. Run it again to continue an interrupted run.
"""
from __future__ import annotations

from torch import Tensor, nn

from backdoor.metrics import watch_backdoor
from model import build_model
from utils.cli import main
from utils.data import Batch
from utils.experiment import Experiment
from utils.losses import kd_terms
from utils.params import KDParams


def train_kd() -> None:
    run = Experiment.from_command_line(KDParams, build_model, __doc__, options=["teacher_resume"])
    params = run.params
    student = run.network()
    teacher = run.frozen(params.teacher_model, params.teacher_resume, role="teacher",
                         num_channels=params.teacher_num_channels)
    watch_backdoor(run)

    def loss(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return kd_terms(student(batch.images), teacher(batch), batch.labels,
                        temperature=params.temperature, alpha=params.alpha)

    run.train(student, loss)


if __name__ == "__main__":
    main(train_kd)
