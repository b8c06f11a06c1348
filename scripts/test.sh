#!/usr/bin/env bash
# Run all checks and tests. Only needs Python: creates .venv and installs requirements-dev.txt there first.
#
#     bash scripts/test.sh                       # all tests, including those marked `slow`
#     bash scripts/test.sh -m "not slow"         # only fast tests, like plain `python -m pytest -n auto`
#     bash scripts/test.sh tests/test_losses.py  # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh requirements-dev.txt

ruff check $(git ls-files '*.py' '*.ipynb' 2> /dev/null || echo .)  # only tracked files, not a user's own
python -m mypy
# worksteal distributes the slow tests over the processes.
python -m pytest -n auto --dist worksteal -m "" "$@"
