#!/usr/bin/env bash
# Ablations of the Nasty Teacher paper on CIFAR-10: accuracy of the students CNN and ResNetC-20 against the weight of
# the nasty teacher's KL term, the temperature, alpha and the fraction of the training data; and a report.
#
#     bash scripts/ablations.sh
#     bash scripts/ablations.sh --jobs 4                  # any option of scripts/run_all.py
#     EXPERIMENTS=experiments/demo bash scripts/ablations.sh    # a small version on the demo's images
#
# Finished runs are skipped. The report is always written; the exit status is that of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
root=${EXPERIMENTS:-experiments/CIFAR10}
experiments=("$root"/baseline "$root"/kd_* "$root"/ablations)
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
