"""Writes a trained LoRA for other tools. `alignprop export` does the same.

    python scripts/export_lora.py logs/my_run/checkpoints/best my_lora.safetensors --format kohya

`--help` says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the file runs as a script, from any folder

from alignprop.command import run_tool

if __name__ == "__main__":
    run_tool("export")
