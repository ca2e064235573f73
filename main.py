"""Reward backpropagation for text-to-image diffusion models.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

`python main.py …` does the same on one device. The presets are in config/align_prop.py.
"""

import os
import sys

# transformers reports at import what is missing for features that nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from absl import app, flags
from ml_collections import config_flags

from alignprop.settings import ConfigError, warnings_for
from rewards.base import RewardError

_CONFIG = config_flags.DEFINE_config_file("config", "config/align_prop.py:quickstart", "Preset to run.")


def parse_flags(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, OSError, TypeError) as error:  # a misspelt field or file
        raise ConfigError(f"--config: {next(filter(None, str(error).splitlines()), error)}") from error


def main(argv):
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]!r} is not a flag; options look like --config.seed=1")
    config = _CONFIG.value
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
        app.run(main, flags_parser=parse_flags)
    except (ConfigError, RewardError) as error:
        sys.exit(f"error: {error}")
