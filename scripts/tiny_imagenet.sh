#!/usr/bin/env bash
# Table 3 (Tiny-ImageNet) of the Nasty Teacher paper: baselines, nasty teachers, students of all teachers, and a report.
#
#     bash scripts/tiny_imagenet.sh
#     bash scripts/tiny_imagenet.sh --seeds 0 1 2 --jobs 4            # any option of scripts/run_all.py
#
# Finished runs are skipped. The report is always written; the exit status is that of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
experiments=(experiments/TinyImageNet)
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
