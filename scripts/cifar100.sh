#!/usr/bin/env bash
# Table 2 (CIFAR-100) of the Nasty Teacher paper: baselines, nasty teachers, students of all teachers, and a report.
#
#     bash scripts/cifar100.sh
#     bash scripts/cifar100.sh --seeds 0 1 2 --jobs 4            # any option of scripts/run_all.py
#
# Finished runs are skipped. The report is always written; the exit status is that of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
experiments=(experiments/CIFAR100/baseline/{shufflenetv2,mobilenetv2,resnet18,resnet50,resnext29}
             experiments/CIFAR100/kd_{normal,nasty}_{resnet18,resnet50,resnext29})
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
