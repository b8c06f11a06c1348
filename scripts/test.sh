#!/usr/bin/env bash
# All tests, on a machine with nothing but Python: makes .venv, installs requirements-dev.txt there, checks and tests.
#
#     bash scripts/test.sh                       # everything
#     bash scripts/test.sh tests/test_losses.py  # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt

ruff check .
python -m pytest -n auto "$@"
