#!/usr/bin/env bash
# All tests, on a machine with nothing but Python: makes .venv, installs requirements-dev.txt there, checks and tests.
#
#     bash scripts/test.sh                       # everything: the fast lane and the tests marked `slow`
#     bash scripts/test.sh -m "not slow"         # the fast lane, as a plain `python -m pytest -n auto` has it
#     bash scripts/test.sh tests/test_losses.py  # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt

ruff check $(git ls-files '*.py' '*.ipynb' 2> /dev/null || echo .)  # not what a user keeps here beside it
python -m mypy
# worksteal: the slow tests do not pile up in one process.
python -m pytest -n auto --dist worksteal -m "" "$@"
