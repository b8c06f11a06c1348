"""Distil a student from a teacher without data, with or without a defense against a backdoor of the teacher.

Methods:

    ood            patches of a single unrelated picture (Asano & Saeed, ICLR 2023)
    zskt           generator of images on which student and teacher disagree (Micaelli & Storkey, NeurIPS 2019)
    dafl           generator of images with confident teacher predictions (Chen et al., ICCV 2019)
    dfq            as dafl, with the teacher's batch-norm statistics too (Choi et al., CVPR workshops 2020)
    cmi            pool of optimized images that differ from each other (Fang et al., IJCAI 2021)
    deepinversion  pool of images with optimized pixels (Yin et al., CVPR 2020)

Defenses of ABD (Hong et al., ICML 2023), `backdoor_defense`:

    sv     shuffling vaccine: images on which the teacher agrees with its shuffled copies are suspicious
    sr     self-retrospection: find a perturbation that changes the outputs, and unlearn it
    sv+sr  both
    auto   sv, or sr if no good vaccine is found

    python train_datafree.py --save_path experiments/CIFAR10/abd/badnet_grid/zskt
    python train_datafree.py --save_path experiments/mine --set backdoor_defense=sv

Needs the checkpoint of the teacher, `teacher_resume` in params.json. Of `dataset`, only the classes, the normalization
and the test images for evaluation are used. With `trigger` the success of that backdoor is measured too. The same
command resumes an interrupted run.
"""
from __future__ import annotations

from typing import Any

from torch import nn

import datafree
from backdoor.metrics import measure_backdoor
from datafree.diagnosis import diagnose, reestimate_batch_norms
from datafree.distiller import DataSpec, teacher_with_interface
from defenses.answers import build_answers
from model import build_model
from model.features import batch_norms
from runs.stages import DATAFREE
from utils import launcher
from utils.cli import main
from utils.data import chosen_augmentation
from utils.errors import UserError
from utils.evaluation import Evaluation
from utils.run import Run


def train_datafree() -> None:
    if launcher.launched():
        raise UserError("data-free methods run on a single device: give each GPU a run of its own")
    run = Run.from_command_line(DATAFREE, build_model, __doc__, options=["teacher_resume"])
    params, test = run.params, run.parts["test"]
    method = datafree.REGISTRY[params.method]
    student = run.network()
    teacher = run.frozen("teacher", build_answers(params))
    backdoor = measure_backdoor(run)
    spec = DataSpec(run.dataset.num_classes, run.dataset.image_size, test.mean, test.std,
                  chosen_augmentation(run.dataset, params))
    learner = method(student, teacher_with_interface(teacher, method, params), spec, params, run.dtype)
    final = dict(backdoor.final)
    vaccine, triggered = learner.defense.vaccine, backdoor.triggered
    if vaccine:
        def report_vaccine(_: nn.Module) -> dict[str, Any]:
            vaccine.end_of_training()
            return vaccine.report() | ({} if triggered is None else diagnose(
                teacher.network, vaccine.shuffled, test, triggered, run.dtype))

        final["vaccine"] = report_vaccine
    images = learner.training_images()  # made after the training
    if backdoor.test and batch_norms(student) and images:
        evaluate = Evaluation({"test": test}, run.dtype, backdoor.metrics)
        final["reestimated_batch_norm"] = lambda network: evaluate(reestimate_batch_norms(network, images, run.dtype))
    run.train(student, learner, metrics=backdoor.metrics, warnings=backdoor.warnings, final=final)


if __name__ == "__main__":
    main(train_datafree)
