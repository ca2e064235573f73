"""Reward backpropagation for text-to-image diffusion models.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

`python main.py …` does the same on one device. The presets are in config/align_prop.py.
"""

import math
import os
import re
import shlex
import sys
import textwrap
import traceback
from contextlib import contextmanager

# They warn of features that nothing here uses, and of what we say ourselves.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

from absl import app, flags
from ml_collections import config_flags

from alignprop.settings.effects import warnings_for
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import FIELDS, check_name, resolve
from alignprop.stopping import plain_endings

PRESET = "config/align_prop.py:quickstart"


@contextmanager
def plain_config_errors():
    """absl and ml_collections report mistakes in many ways, with the reason in the text; here it is one line."""
    try:
        yield
    except ConfigError:
        raise
    except flags.Error as error:
        if "Traceback" in str(error):  # ml_collections puts a TypeError of the file's own into the text
            raise _file_error(str(error)) from error
        raise ConfigError(_flag_error(" ".join(str(error).split()))) from error
    except Exception as error:  # whatever a file raises that is no configuration
        raise _file_error("".join(traceback.format_exception(error.__cause__ or error))) from error


def _file_error(text: str) -> ConfigError:
    """Of a configuration file that could not be used, from a traceback's text: what was raised, and where in it."""
    given = re.search(r"(?:^| )--?config[= ](\S+)", " ".join(sys.argv))
    config = given[1] if given else PRESET
    path = os.path.abspath(config.partition(":")[0])
    _, frame, rest = text.rpartition('File "')
    # What was raised is the first line after the frames that is not indented.
    raised = re.search(r"\n(?:[a-z]\w*\.)*(\w+.*)", rest if frame else f"\n{text}", re.DOTALL)[1]
    hint = re.search(r"Did you mean .*?\?", raised[200:], re.DOTALL)
    reason = " ".join([textwrap.shorten(raised, 200, placeholder=" …"), *([hint[0]] if hint else [])])
    lines = [line for file, line in re.findall(r'File "(.+?)", line (\d+)', text) if os.path.abspath(file) == path]
    place = f" (line {lines[-1]})" if lines else ""
    return ConfigError(
        f"--config={config} could not be used: {reason}{place} — give a file and preset such as {PRESET}"
    )


def _flag_error(text: str) -> str:
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if wrong and wrong[1] in FIELDS:
        return f"{wrong[1]} = {wrong[2]!r} must be {FIELDS[wrong[1]].wanted}"
    return f"{text}; options look like --config.seed=1"


def define_flags(argv):
    with plain_config_errors():
        seen = set()
        for argument in argv[1:]:
            if option := re.match(r"--?(?:no)?config\.([^=]+)", argument):
                check_name(option[1])
                # Of several values of a tuple ml_collections would make one, of any other field it takes the last.
                rule = FIELDS.get(option[1])
                if option[1] in seen and rule and "separated by commas" in rule.wanted:
                    raise ConfigError(f"{option[1]} is given twice")
                seen.add(option[1])
        config_flags.DEFINE_config_file("config", PRESET, "Configuration file and preset to run.")
        flags.DEFINE_bool("plan", False, "Print what training will cost with each memory policy, and end.")
        flags.DEFINE_float("gpu_memory", None, "With --plan: GiB of the GPU to plan for.", lower_bound=0.1)


def parse_flags(argv):
    with plain_config_errors():
        arguments = flags.FLAGS(argv)
        _ = flags.FLAGS.config.task  # a configuration that could not be loaded says so only when it is used
    return arguments


def main(argv):
    if len(argv) > 1:
        raise ConfigError(f"{argv[1]!r} is not a flag; options look like --config.seed=1")
    config = flags.FLAGS.config
    resolve(config, num_processes=1)  # most mistakes are found here, before torch is loaded
    overridden = config_flags.get_override_values(flags.FLAGS["config"])
    for line in warnings_for(config, overridden) if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {line}", file=sys.stderr)
    gpu_memory = flags.FLAGS.gpu_memory
    if gpu_memory and not flags.FLAGS.plan:
        raise ConfigError("--gpu_memory has a meaning with --plan only")
    if gpu_memory and not math.isfinite(gpu_memory):
        raise ConfigError(f"--gpu_memory = {gpu_memory} must be a finite number of GiB")
    if flags.FLAGS.plan and config.task != "train":
        raise ConfigError(f"--plan is about training, and task = {config.task!r} does not train")
    if flags.FLAGS.plan and config.algorithm == "ddpo":
        raise ConfigError("--plan is about back-propagation, and algorithm = 'ddpo' has none")
    with config.unlocked():
        config.command = shlex.join(["python", *sys.argv])  # for the run's config.json
    run_task(config, flags.FLAGS.plan, flags.FLAGS.gpu_memory)


def run_task(config, plan_only=False, gpu_memory=None):
    """Imports what the task needs, and does it."""
    import diffusers
    import transformers

    # Loading takes seconds; downloads and the run keep their progress bars.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))
    if plan_only:
        from alignprop.tasks import compare_policies

        compare_policies(config, gpu_memory)
    elif config.task == "evaluate":
        from alignprop.tasks import evaluate

        evaluate(config)
    elif config.task == "guide":
        from alignprop.tasks import guide

        guide(config)
    elif config.task == "evaluate_soup":
        from alignprop.tasks import evaluate_soup

        evaluate_soup(config)
    elif config.algorithm == "ddpo":
        from alignprop.ddpo import DDPOTrainer

        DDPOTrainer(config).train()
    else:
        from alignprop.trainer import AlignPropTrainer

        AlignPropTrainer(config).train()


if __name__ == "__main__":
    with plain_endings():
        define_flags(sys.argv)
        app.run(main, flags_parser=parse_flags)
