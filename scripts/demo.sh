#!/usr/bin/env bash
# The whole system on real images in a few minutes on two CPU cores: a normal teacher, the nasty teacher that is made
# from it, and an audit of each: what thieves with a tenth of the training images get from it, by which attack.
#
#     bash scripts/demo.sh           # students of one seed
#     bash scripts/demo.sh 0 1 2     # of three
#
# Makes .venv and installs requirements.txt there first. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # these networks gain little from a second thread, and lose much on a busy core
seeds=${*:-0}
python scripts/run_all.py experiments/demo/baseline/net16 experiments/demo/kd_nasty_net16/nasty_net16 --seeds 0
for model in normal nasty; do
    python audit.py --save_path experiments/demo/audits/$model --set "seeds=[${seeds// /,}]"
done
