"""Reward backpropagation for text-to-image diffusion models.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

`python main.py …` does the same on one device. The presets are in config/, and docs/config.md lists all fields.
alignprop/command.py reads the flags; its `run_task` imports the trainer or the task that the configuration names.
"""

import sys

try:
    from alignprop.command import run_flags
except ModuleNotFoundError as error:
    if (error.name or "").startswith("alignprop"):
        raise
    sys.exit(f"error: the package {error.name!r} is not installed; activate the environment, or `pip install -e .`")

if __name__ == "__main__":
    run_flags(sys.argv)
