"""Reward backpropagation for text-to-image diffusion models.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

`python main.py …` does the same on one device. The presets are in config/align_prop.py.
"""

import os
import sys
from contextlib import contextmanager

# transformers reports at import what is missing for features that nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from absl import app, flags
from ml_collections import config_flags

from alignprop.settings import ConfigError, warnings_for
from rewards.base import RewardError

PRESET = "config/align_prop.py:quickstart"


@contextmanager
def plain_config_errors():
    """ml_collections reports a misspelt field or a missing file as these, with the reason in the text."""
    try:
        yield
    except (AttributeError, KeyError, OSError) as error:
        reason = error
        while isinstance(reason, Exception):
            reason = reason.args[-1]
        raise ConfigError(f"--config: {' '.join(str(reason).split())}") from error


def parse_flags(argv):
    with plain_config_errors():
        arguments = app.parse_flags_with_usage(argv)
        _ = flags.FLAGS.config.task  # a configuration that could not be loaded says so only when it is used
    return arguments


def main(argv):
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]!r} is not a flag; options look like --config.seed=1")
    config = flags.FLAGS.config
    overridden = config_flags.get_override_values(flags.FLAGS["config"])
    for line in warnings_for(config, overridden) if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {line}", file=sys.stderr)
    if config.task == "evaluate":
        from alignprop.tasks import evaluate

        evaluate(config)
    elif config.task == "evaluate_soup":
        from alignprop.tasks import evaluate_soup

        evaluate_soup(config)
    else:
        from alignprop.trainer import AlignPropTrainer

        AlignPropTrainer(config).train()


if __name__ == "__main__":
    try:
        with plain_config_errors():
            config_flags.DEFINE_config_file("config", PRESET, "Configuration file and preset to run.")
        app.run(main, flags_parser=parse_flags)
    except (ConfigError, RewardError) as error:
        sys.exit(f"error: {error}")
