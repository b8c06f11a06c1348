"""Distil a student from a teacher without its data, with or without a defense against a backdoor in it.

    ood            patches of one picture that has nothing to do with the data (Asano & Saeed, ICLR 2023)
    zskt           a generator makes images on which student and teacher disagree (Micaelli & Storkey, NeurIPS 2019)
    dafl           a generator makes images that the teacher is sure of (Chen et al., ICCV 2019)
    dfq            the same, by the teacher's batch norms too (Choi et al., CVPR workshops 2020)
    cmi            images that differ from each other are fitted, and kept (Fang et al., IJCAI 2021)
    deepinversion  pixels are fitted, and kept (Yin et al., CVPR 2020)

and `backdoor_defense`, the two of ABD (Hong et al., ICML 2023):

    sv     shuffling vaccine: images that the teacher answers as its shuffled copies do are suspicious
    sr     self-retrospection: a perturbation that changes what the student says is found and unlearned
    sv+sr  both
    auto   sv, or sr where no good vaccine is found

    python train_datafree.py --save_path experiments/CIFAR10/abd/badnet_grid/zskt
    python train_datafree.py --save_path experiments/mine --set backdoor_defense=sv

Needs the teacher's checkpoint, `teacher_resume` of params.json. The data set is there for its classes and constants and
for evaluation: of its images, the method gets none. With a `trigger` the success of that backdoor is measured too.
"""
from __future__ import annotations

import datafree
from backdoor.metrics import measure_backdoor
from datafree.diagnosis import diagnose
from datafree.distiller import DataSpec, teacher_with_interface
from defenses.answers import build_answers
from model import build_model
from runs.stages import DATAFREE
from utils import launcher
from utils.cli import main
from utils.data import chosen_augmentation
from utils.errors import UserError
from utils.run import Run


def train_datafree() -> None:
    if launcher.launched():
        raise UserError("data-free methods run on one device: several GPUs take one run each")
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
    if vaccine and triggered is not None:
        final["vaccine"] = lambda _: vaccine.report() | diagnose(
            teacher.network, vaccine.shuffled, test, triggered, run.dtype)
    run.train(student, learner, metrics=backdoor.metrics, warnings=backdoor.warnings, final=final)


if __name__ == "__main__":
    main(train_datafree)
