#!/usr/bin/env bash
# Table 1 (CIFAR-10) of the Nasty Teacher paper: baselines, nasty teachers, students of all teachers, and a report.
#
#     bash scripts/cifar10.sh
#     bash scripts/cifar10.sh --seeds 0 1 2 --jobs 4            # any option of scripts/run_all.py
#
# Finished runs are skipped. The report is always written; the exit status is that of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
experiments=(experiments/CIFAR10/baseline/{cnn,preresnet20,preresnet32,resnet18} experiments/CIFAR10/kd_{normal,nasty}_resnet18)
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
