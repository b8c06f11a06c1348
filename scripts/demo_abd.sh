#!/usr/bin/env bash
# A backdoor, inherited and stopped, on two CPU cores: a poisoned teacher and a clean one, a student with a fifth of the
# data, a student without data, the same with the vaccine of ABD, and one table.
#
#     bash scripts/demo_abd.sh           # seed 0, in experiments/demo/abd
#     bash scripts/demo_abd.sh 0 1 2     # three teachers; seed N > 0 in experiments/demo/abd-seedN
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/seeds.sh
begin 5 "$@"

for seed in "${seeds[@]}"; do
    directory=$(seeded experiments/demo/abd "$seed")
    run train_scratch.py --save_path "$directory/clean"
    run train_poisoned.py --save_path "$directory/teacher"
    run train_kd.py --save_path "$directory/kd"
    run train_datafree.py --save_path "$directory/ood"
    run train_datafree.py --save_path "$directory/ood_abd"
    directories+=("$directory")
done
python scripts/demo_abd_table.py "${directories[@]}"
echo "$SECONDS s without the installation."
