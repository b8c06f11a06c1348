#!/usr/bin/env bash
# The whole system on real images in a few minutes on two CPU cores: a normal teacher, the nasty teacher made from it,
# students of both (a copy of the teacher's network and a smaller one), and one table.
#
#     bash scripts/demo.sh           # seed 0, in experiments/demo
#     bash scripts/demo.sh 0 1 2     # three seeds; seed N > 0 in experiments/demo-seedN
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/seeds.sh
begin 7 "$@"

for seed in "${seeds[@]}"; do
    directory=$(seeded experiments/demo "$seed")
    for network in net16 net8; do
        run train_scratch.py --save_path "$directory/baseline/$network"
    done
    run train_nasty.py --save_path "$directory/kd_nasty_net16/nasty_net16"
    for teacher in normal nasty; do
        for student in net16 net8; do
            run train_kd.py --save_path "$directory/kd_${teacher}_net16/$student"
        done
    done
    directories+=("$directory")
done
python scripts/demo_table.py "${directories[@]}"
echo "$SECONDS s without the installation."
