#!/usr/bin/env bash
# A backdoor that students inherit, and a defense, on two CPU cores: a poisoned and a clean teacher, a student with a
# fifth of the data, a student without data, a student without data with ABD's vaccine, and a table.
#
#     bash scripts/demo_abd.sh           # seed 0
#     bash scripts/demo_abd.sh 0 1 2     # three teachers; seed N > 0 of an experiment is in DIR/seedN
#
# Creates .venv and installs requirements.txt there first. Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
python scripts/run_all.py experiments/demo/abd --seeds "${@:-0}"
python report.py experiments/demo/abd
