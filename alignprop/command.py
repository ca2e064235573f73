"""The command line of `main.py` and of the installed command `alignprop`.

    python main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4
    alignprop train --config hps --config.train.learning_rate=5e-4

The first argument of `alignprop` says what to do: a task of the configuration, `plan`, or a tool of
publish/commands.py. A preset that comes with the package is given by its name, without a file.
"""

import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

# These libraries warn of features that nothing here uses, and of problems that this package reports itself.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

from absl import app, flags
from ml_collections import ConfigDict

from alignprop.engine.stopping import plain_endings
from alignprop.settings.command_line import check_flags, define_flags, parse_flags, quiet_libraries, warn_of_unused
from alignprop.settings.errors import one_of
from alignprop.settings.resolve import resolve

TRAINERS = {"align_prop": ("alignprop.trainer", "AlignPropTrainer"), "ddpo": ("alignprop.ddpo", "DDPOTrainer")}
PRESET_FILES = ("align_prop", "models", "ddpo")  # modules of `config`, in the order in which a preset is looked up
# The preset that each command uses if none is given.
TASKS = {
    "train": "quickstart", "evaluate": "evaluate", "evaluate_soup": "evaluate_soup", "guide": "guide",
    "explore": "explore", "plan": "hps",
}  # fmt: skip
TOOLS = ("export", "push", "film")
USAGE = f"""usage: alignprop COMMAND [--config PRESET] [--config.FIELD=VALUE …]

commands: {", ".join((*TASKS, *TOOLS))}
presets:  hps, aesthetic, quickstart, ddpo:aesthetic, …, or a file of your own as path/to/file.py:preset

    alignprop train --config quickstart
    alignprop evaluate --config tiny_evaluate --config.resume_from=logs/my_run
    alignprop export --help"""


def main() -> None:
    """Runs the command `alignprop` with the arguments of the process."""
    with plain_endings():
        command, *arguments = sys.argv[1:] or ["help"]
        if command in ("help", "--help", "-h"):
            print(USAGE)
        elif one_of("command", command, (*TASKS, *TOOLS)) in TOOLS:
            sys.argv = [f"alignprop {command}", *arguments]
            run_tool(command)
        else:
            run_flags([sys.argv[0], *with_preset(arguments, TASKS[command]), *_of_task(command)])


def run_tool(name: str) -> None:
    """Runs one of TOOLS with the arguments of the process."""
    with plain_endings():
        getattr(import_module("alignprop.publish.commands"), name)()


def run_flags(argv: list[str]) -> None:
    """Reads the flags of a program, resolves the configuration, and runs its task.

    Args:
        argv: the arguments, in the form of `sys.argv`. They replace `sys.argv`, because ml_collections looks there for
            overrides.
    """
    with plain_endings():
        command = shlex.join(["python", *sys.argv]) if sys.argv == argv else shlex.join(["alignprop", *sys.argv[1:]])
        sys.argv = argv = [argv[0], *with_preset(argv[1:], "")]
        define_flags(argv)
        app.run(lambda arguments: run_parsed(arguments, command), argv=argv, flags_parser=parse_flags)


def run_parsed(arguments: list[str], command: str) -> None:
    """Does what the parsed flags ask for.

    Args:
        arguments: the arguments that are not flags.
        command: the command that was typed, for the run's config.json.
    """
    config = flags.FLAGS.config
    resolve(config, num_processes=1)  # this finds most mistakes before torch is loaded
    warn_of_unused(config)
    check_flags(arguments, config)
    with config.unlocked():
        config.command = command
    if flags.FLAGS.plan:
        import_module("alignprop.tasks.plan").compare_policies(config, flags.FLAGS.gpu_memory, flags.FLAGS.gpu)
    else:
        run_task(config)


def run_task(config: ConfigDict) -> None:
    """Imports the task that the configuration names, and runs it."""
    quiet_libraries()
    if config.task == "train":
        module, trainer = TRAINERS[config.algorithm]
        getattr(import_module(module), trainer)(config).train()
    else:
        module = "alignprop.tasks.explore" if config.task == "explore" else "alignprop.tasks"
        getattr(import_module(module), config.task)(config)


def _of_task(command: str) -> list[str]:
    """Returns the flag that makes any preset run this command."""
    return ["--plan"] if command == "plan" else [f"--config.task={command}"]


def with_preset(arguments: list[str], usual: str) -> list[str]:
    """Returns the arguments with `--config` in the form "path/to/file.py:preset".

    Args:
        arguments: the arguments after the command.
        usual: the preset that is used if the arguments have no `--config`. If it is empty, none is added, and paths are
            left as they are.

    Raises:
        ConfigError: there is no such preset.
    """

    def found(name: str) -> str:
        return preset_file(name) if usual or re.fullmatch(r"[\w:]+", name) else name

    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            arguments[i] = f"--config={found(value)}"
            return arguments
        if flag in ("--config", "-config") and i + 1 < len(arguments):
            arguments[i + 1] = found(arguments[i + 1])
            return arguments
    return [f"--config={preset_file(usual)}", *arguments] if usual else arguments


def preset_file(name: str) -> str:
    """Returns a preset in the form "path/to/file.py:preset".

    Args:
        name: either this form, which is returned as it is, or "file:preset" or "preset" of the presets that come with
            the package.

    Raises:
        ConfigError: there is no such file, or no such preset in the package.
    """
    file, _, preset = name.partition(":")
    if os.path.isfile(file):
        return name
    modules = {stem: import_module(f"config.{stem}") for stem in PRESET_FILES}
    stem = Path(file).stem
    if stem in modules:
        return f"{modules[stem].__file__}:{preset}" if preset else str(modules[stem].__file__)
    presets = {known: module.__file__ for module in reversed(modules.values()) for known in module.PRESETS}
    return f"{presets[one_of('--config', name, presets)]}:{name}"
