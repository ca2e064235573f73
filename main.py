"""Reward backpropagation for text-to-image diffusion models.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

`python main.py …` does the same on one device. The presets are in config/, all fields in docs/config.md.
"""

import os
import shlex
import sys
from importlib import import_module

# They warn of features that nothing here uses, and of what we say ourselves.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

from absl import app, flags

from alignprop.settings.command_line import check_flags, define_flags, parse_flags, quiet_libraries, warn_of_unused
from alignprop.settings.resolve import resolve
from alignprop.stopping import plain_endings

TRAINERS = {"align_prop": ("alignprop.trainer", "AlignPropTrainer"), "ddpo": ("alignprop.ddpo", "DDPOTrainer")}


def main(arguments):
    config = flags.FLAGS.config
    resolve(config, num_processes=1)  # most mistakes are found here, before torch is loaded
    warn_of_unused(config)
    check_flags(arguments, config)
    with config.unlocked():
        config.command = shlex.join(["python", *sys.argv])  # for the run's config.json
    if flags.FLAGS.plan:
        import_module("alignprop.tasks").compare_policies(config, flags.FLAGS.gpu_memory)
    else:
        run_task(config)


def run_task(config):
    """Imports what the task needs, and does it."""
    quiet_libraries()
    if config.task == "train":
        module, trainer = TRAINERS[config.algorithm]
        getattr(import_module(module), trainer)(config).train()
    else:
        getattr(import_module("alignprop.tasks"), config.task)(config)


if __name__ == "__main__":
    with plain_endings():
        define_flags(sys.argv)
        app.run(main, flags_parser=parse_flags)
