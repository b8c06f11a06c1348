#!/usr/bin/env bash
# Theft without data, on two CPU cores: images are dreamt up from a normal and from a nasty teacher (DeepInversion), a
# student learns from each, and one table and one picture compare them.
#
#     bash scripts/demo_theft.sh           # seed 0, in experiments/demo
#     bash scripts/demo_theft.sh 0 1 2     # three seeds; seed N > 0 in experiments/demo-seedN
#
# Makes .venv and installs requirements.txt there first. What is finished, of demo.sh too, is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/seeds.sh
begin 4 "$@"

for seed in "${seeds[@]}"; do
    directory=$(seeded experiments/demo "$seed")
    run train_scratch.py --save_path "$directory/baseline/net16"
    run train_nasty.py --save_path "$directory/kd_nasty_net16/nasty_net16"
    for teacher in normal nasty; do
        run train_datafree.py --save_path "$directory/kd_${teacher}_net16/deepinversion_net16"
    done
    directories+=("$directory")
done
python scripts/show_inversions.py "${directories[0]}"/kd_{normal,nasty}_net16/deepinversion_net16
python scripts/demo_theft_table.py "${directories[@]}"
echo "$SECONDS s without the installation."
