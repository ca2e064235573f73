#!/usr/bin/env bash
# Runs lint, format check, type check of the public surface, and tests in the project's own virtual environment, which
# the first call sets up.
#
#   bash scripts/test.sh          the tests, without those that take long and mostly repeat others (tests/exhaustive.py)
#   bash scripts/test.sh --all    all tests
#   bash scripts/test.sh --fast   only the quick tests of single modules, in about a minute and a half
#
# Further options are pytest's, such as -k rollout, or -n 0 for a single process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env requirements.txt requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
options=(-n auto --maxprocesses 4 --dist worksteal)
selected=(-m "not exhaustive")
for option in "$@"; do
    case $option in
        --all) selected=(-m "") ;;
        --fast) options+=(tests/unit) ;;
        *::*) selected=(-m "") && options+=("$option") ;;  # a test that is named is wanted
        *) options+=("$option") ;;
    esac
done
# The tests run in several processes of one thread each, because their tensors are too small to share between threads.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest "${selected[@]}" "${options[@]}"
