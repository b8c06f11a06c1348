#!/usr/bin/env bash
# Table 3 (Tiny-ImageNet) of the Nasty Teacher paper: baselines, nasty teachers, students of both, and the report.
#
#     bash scripts/tiny_imagenet.sh
#     bash scripts/tiny_imagenet.sh --seeds 0 1 2 --jobs 4            # any option of scripts/run_all.py
#
# What is finished is not run again. The exit status is that of the runs; the report is written in any case.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements.txt
experiments=(experiments/TinyImageNet)
python scripts/run_all.py "${experiments[@]}" "$@" || status=$?
python report.py "${experiments[@]}"
exit "${status:-0}"
