#!/usr/bin/env bash
# The whole system on real images in a few minutes on two CPU cores: a normal teacher, the nasty teacher made from it,
# students of both (a copy of the teacher's network and a smaller one) at the temperature that the nasty teacher is made
# against, students of thieves without labels who choose another one, and tables.
#
#     bash scripts/demo.sh           # seed 0
#     bash scripts/demo.sh 0 1 2     # three seeds; seed N > 0 of an experiment in DIR/seedN
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # these networks gain little from a second thread, and lose much on a busy core
experiments=(experiments/demo/{baseline,kd_normal_net16,kd_nasty_net16}/net{16,8} experiments/demo/kd_nasty_net16/nasty_net16)
attacks=(experiments/demo/attacks/{normal,nasty}_net16/no_labels/{kd_t1,kd_t20,hard_label})
python scripts/run_all.py "${experiments[@]}" "${attacks[@]}" --seeds "${@:-0}"
python report.py "${experiments[@]}" "${attacks[@]}"
