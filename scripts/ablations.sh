#!/usr/bin/env bash
# The ablations of the Nasty Teacher paper on CIFAR-10: the students CNN and ResNetC-20 against the weight of the nasty
# teacher's KL term, their temperature, their alpha and the fraction of the training data; and the report.
#
#     bash scripts/ablations.sh
#     bash scripts/ablations.sh --jobs 4                  # any option of scripts/run_all.py
#     EXPERIMENTS=experiments/demo bash scripts/ablations.sh    # a small one, on the demo's images
#
# What is finished is not run again. The exit status is that of the runs; the report is written in any case.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
root=${EXPERIMENTS:-experiments/CIFAR10}
experiments=("$root"/baseline "$root"/kd_* "$root"/ablations)
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
