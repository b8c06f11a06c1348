#!/usr/bin/env bash
# The whole system on real images in a few minutes on two CPU cores: a normal teacher, the nasty teacher made from it,
# students of both and students without a teacher, and one table.
#
#     bash scripts/demo.sh           # seed 0, in experiments/demo
#     bash scripts/demo.sh 0 1 2     # three seeds; seed N > 0 in experiments/demo-seedN
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt

SECONDS=0
directories=()
for seed in "${@:-0}"; do
    directory=experiments/demo
    if [ "$seed" != 0 ]; then
        directory="experiments/demo-seed$seed"
        (cd experiments/demo && find . -name params.json) | while read -r file; do
            mkdir -p "$(dirname "$directory/$file")"
            sed "s#experiments/demo/#$directory/#" "experiments/demo/$file" > "$directory/$file"
        done
    fi
    for network in net24 net12 net8; do
        python train_scratch.py --save_path "$directory/baseline/$network" --set "seed=$seed"
    done
    python train_nasty.py --save_path "$directory/kd_nasty_net24/nasty_net24" --set "seed=$seed"
    for teacher in normal nasty; do
        for student in net12 net8; do
            python train_kd.py --save_path "$directory/kd_${teacher}_net24/$student" --set "seed=$seed"
        done
    done
    directories+=("$directory")
done
python scripts/demo_table.py "${directories[@]}"
echo "$SECONDS s without the installation."
