#!/usr/bin/env bash
# The whole system on real images, in a few minutes on two CPU cores: a normal teacher, a nasty teacher made from it,
# and an audit of each, against thieves with a tenth of the training images.
#
#     bash scripts/demo.sh           # one seed for the students
#     bash scripts/demo.sh 0 1 2     # three seeds
#
# Creates .venv and installs requirements.txt there first. Finished runs are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # a second thread gains little here, and costs much on a busy core
seeds=${*:-0}
python scripts/run_all.py experiments/demo/baseline/net16 experiments/demo/kd_nasty_net16/nasty_net16 --seeds 0
for model in normal nasty; do
    python audit.py --save_path experiments/demo/audits/$model --set "seeds=[${seeds// /,}]"
done
python audit.py --compare experiments/demo/audits/normal experiments/demo/audits/nasty
echo "The full audits, with figures: experiments/demo/audits/normal/audit.md, experiments/demo/audits/nasty/audit.md"
