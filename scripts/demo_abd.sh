#!/usr/bin/env bash
# A backdoor, inherited and stopped, on two CPU cores: a poisoned teacher and a clean one, a student with a fifth of the
# data, a student without data, the same with the vaccine of ABD, and one table.
#
#     bash scripts/demo_abd.sh           # seed 0
#     bash scripts/demo_abd.sh 0 1 2     # three teachers; seed N > 0 of an experiment in DIR/seedN
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
python scripts/run_all.py experiments/demo/abd --seeds "${@:-0}"
python report.py experiments/demo/abd
