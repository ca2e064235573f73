#!/usr/bin/env bash
# Runs main.py in the project's own virtual environment, which the first call sets up.
#
#   bash scripts/run.sh --config config/align_prop.py:quickstart [--config.<field>=<value> ...]
#
# Works from any folder; relative paths are relative to the project. PYTHON names the interpreter for the set-up.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env requirements.txt
exec .venv/bin/python main.py "$@"
