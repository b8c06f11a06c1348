"""Distil a student from a teacher without its data, with or without a defence against a backdoor in it.

    ood            patches of one picture that has nothing to do with the data (Asano & Saeed, ICLR 2023)
    zskt           a generator makes images on which student and teacher disagree (Micaelli & Storkey, NeurIPS 2019)
    dafl           a generator makes images that the teacher is sure of (Chen et al., ICCV 2019)
    dfq            the same, by the teacher's batch norms too (Choi et al., CVPR workshops 2020)
    cmi            images that differ from each other are fitted, and kept (Fang et al., IJCAI 2021)
    deepinversion  pixels are fitted, and kept (Yin et al., CVPR 2020)

and `defense`, the two of ABD (Hong et al., ICML 2023):

    sv     shuffling vaccine: images that the teacher answers as its shuffled copies do are suspicious
    sr     self-retrospection: a perturbation that changes what the student says is found and unlearned
    sv+sr  both
    auto   sv, or sr where no good vaccine is found

    python train_datafree.py --save_path experiments/CIFAR10/abd/badnet_grid/zskt
    python train_datafree.py --save_path experiments/mine --set defense=sv

Needs the teacher's checkpoint, `teacher_resume` of params.json. The data set is there for its classes and constants and
for evaluation: of its images, the method gets none. With a `trigger` the success of that backdoor is measured too.
"""
from __future__ import annotations

from backdoor.metrics import watch_backdoor
from datafree import methods
from datafree.diagnosis import diagnose
from datafree.distiller import Facts
from model import build_model
from utils import launcher
from utils.cli import main
from utils.data import chosen_augmentation
from utils.errors import UserError
from utils.experiment import Experiment
from utils.params import METHODS


def train_datafree() -> None:
    if launcher.launched():
        raise UserError("data-free methods run on one device: several GPUs take one run each")
    run = Experiment.from_command_line(METHODS, build_model, __doc__, options=["teacher_resume"])
    params, test = run.params, run.parts["test"]
    student = run.network()
    teacher = run.frozen(params.teacher_model, params.teacher_resume, role="teacher",
                         num_channels=params.teacher_num_channels)
    test_of_backdoor = watch_backdoor(run)
    facts = Facts(run.dataset.num_classes, run.dataset.image_size, test.mean, test.std,
                  chosen_augmentation(run.dataset, params))
    learner = methods.METHODS[params.method](student, teacher.network, facts, params, run.dtype)
    if test_of_backdoor and (shuffled := learner.defence.shuffled):
        run.details["vaccine"] = lambda _: learner.defence.report() | diagnose(
            teacher.network, shuffled, test, test_of_backdoor.triggered, run.dtype)
    run.run(student, learner)


if __name__ == "__main__":
    main(train_datafree)
