#!/usr/bin/env bash
# Theft without data, on two CPU cores: DeepInversion inverts images from a normal and from a nasty teacher, OoD uses
# patches of a drawn picture. A student learns from each, at the method's temperature and at 1, and from the predicted
# classes for the patches only (hard labels). A table and an image grid compare them.
#
#     bash scripts/demo_theft.sh           # seed 0
#     bash scripts/demo_theft.sh 0 1 2     # three seeds; seed N > 0 of an experiment is in DIR/seedN
#
# Creates .venv and installs requirements.txt there first. Finished runs, including those of demo.sh, are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
inversions=(experiments/demo/kd_{normal,nasty}_net16/deepinversion_net16)
experiments=(experiments/demo/baseline/net16 experiments/demo/kd_nasty_net16/nasty_net16 "${inversions[@]}"
             experiments/demo/kd_{normal,nasty}_net16/ood_net16 experiments/demo/kd_{normal,nasty}_net16_{t1,label})
python scripts/run_all.py "${experiments[@]}" --seeds "${@:-0}"
seed=${1:-0}
[ "$seed" = 0 ] || inversions=("${inversions[@]/%//seed$seed}")
python scripts/show_inversions.py "${inversions[@]}"
python report.py "${experiments[@]}"
