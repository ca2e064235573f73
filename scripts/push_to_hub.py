"""Uploads a run to the Hugging Face hub. `alignprop push` does the same.

    python scripts/push_to_hub.py logs/my_run --repo user/name --private

`--help` says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script, from any folder

from alignprop.command import run_tool

if __name__ == "__main__":
    run_tool("push")
