"""The flags of main.py, and what absl and ml_collections say of mistakes in them, in one line."""

import math
import os
import re
import sys
import textwrap
import traceback
from contextlib import contextmanager, suppress

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.settings.fields.field import Field
from alignprop.settings.resolve import check_name
from alignprop.settings.warnings import warnings_for

PRESET = "config/align_prop.py:quickstart"


def define_flags(argv: list[str]) -> None:
    """Defines `--config`, `--plan` and `--gpu_memory`.

    Args:
        argv: `sys.argv`, where ml_collections looks for overrides. What a --flagfile has takes its place in it, and
            lists are written as Python has them.

    Raises:
        ConfigError: a field that does not exist, or a list that is given twice.
    """
    with _plain_errors():
        argv[:] = with_files(argv)
        names = [match[1] for argument in argv[1:] if (match := re.match(r"--?(?:no)?config\.([^=]+)", argument))]
        for name in names:
            check_name(name)
            # Of several values of a list ml_collections would make one, of any other field it takes the last.
            if name in FIELDS and FIELDS[name].rule.type is tuple and names.count(name) > 1:
                raise ConfigError(f"{name} is given twice")
        argv[:] = with_lists(argv)
        config_flags.DEFINE_config_file("config", PRESET, "Configuration file and preset to run.")
        flags.DEFINE_bool("plan", False, "Print what training will cost with each memory policy, and end.")
        flags.DEFINE_float("gpu_memory", None, "With --plan: GiB of the GPU to plan for.", lower_bound=0.1)


def with_files(argv: list[str]) -> list[str]:
    """The same arguments, with what each --flagfile has in its place."""
    return [*argv[:1], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]


def with_lists(argv: list[str]) -> list[str]:
    """The same arguments, the values of lists in Python's own notation, which is what ml_collections reads."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        name = re.sub(r"^--?config\.", "", flag)
        if name == flag or name not in FIELDS or FIELDS[name].rule.type is not tuple:
            continue
        if equals:
            argv[i] = f"{flag}={_list_literal(value, FIELDS[name])}"
        elif i + 1 < len(argv):
            argv[i + 1] = _list_literal(argv[i + 1], FIELDS[name])
    return argv


def _list_literal(text: str, field: Field) -> str:
    """'to_q,to_out.0' -> "('to_q', 'to_out.0')", '0,1' -> '(0, 1)': brackets, quotes and spaces are optional."""
    inside = re.sub(r"^([(\[])(.*)[)\]]$", r"\2", text.strip())
    words = tuple(word.strip().strip("'\"") for word in inside.split(",") if word.strip())
    values = (words, tuple(map(_number, words)))
    # What is wrong stays as it was typed, for the message.
    return next((repr(value) for value in values if text.strip() != "None" and field.rule.accepts(value)), text)


def _number(word: str):
    """The word as a number, where it is one."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def parse_flags(argv: list[str]) -> list[str]:
    """What absl calls to read the flags; the arguments that are none."""
    with _plain_errors():
        arguments = flags.FLAGS(argv)
        _ = flags.FLAGS.config.task  # a configuration that could not be loaded says so only when it is used
    return arguments


def check_flags(arguments: list[str], config: ConfigDict) -> None:
    """Refuses flags that contradict each other.

    Raises:
        ConfigError: with the flag.
    """
    plan, gpu_memory = flags.FLAGS.plan, flags.FLAGS.gpu_memory
    if len(arguments) > 1:
        raise ConfigError(f"{arguments[1]!r} is not a flag; options look like --config.seed=1")
    if gpu_memory and not plan:
        raise ConfigError("--gpu_memory has a meaning with --plan only")
    if gpu_memory and not math.isfinite(gpu_memory):
        raise ConfigError(f"--gpu_memory = {gpu_memory} must be a finite number of GiB")
    if plan and config.task != "train":
        raise ConfigError(f"--plan is about training, and task = {config.task!r} does not train")
    if plan and config.algorithm == "ddpo":
        raise ConfigError("--plan is about back-propagation, and algorithm = 'ddpo' has none")


def warn_of_unused(config: ConfigDict) -> None:
    """Says, once a machine's first process, which of the given fields have no effect."""
    names = config_flags.get_override_values(flags.FLAGS["config"])
    for line in warnings_for(config, names) if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {line}", file=sys.stderr)


def quiet_libraries() -> None:
    """Loading takes seconds and needs no progress bars; downloads and the run keep theirs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))


@contextmanager
def _plain_errors():
    """absl and ml_collections report mistakes in many ways, with the reason in the text; here it is one line."""
    try:
        yield
    except ConfigError:
        raise
    except flags.Error as error:
        if "Traceback" in str(error):  # ml_collections puts a TypeError of the file's own into the text
            raise _file_error(str(error)) from error
        raise ConfigError(_flag_error(" ".join(str(error).removeprefix("ERROR:: ").split()))) from error
    except Exception as error:  # whatever a file raises that is no configuration
        raise _file_error("".join(traceback.format_exception(error.__cause__ or error))) from error


def _flag_error(text: str) -> str:
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if wrong and wrong[1] in FIELDS:
        return f"{wrong[1]} = {wrong[2]!r} must be {FIELDS[wrong[1]].rule.wanted}"
    return f"{text}; options look like --config.seed=1"


def _file_error(text: str) -> ConfigError:
    """Of a configuration file that could not be used, from a traceback's text: what was raised, and where in it."""
    option = re.search(r"(?:^| )--?config[= ](\S+)", " ".join(sys.argv))
    config = option[1] if option else PRESET
    path = os.path.abspath(config.partition(":")[0])
    _, frame, rest = text.rpartition('File "')
    # What was raised is the first line after the frames that is not indented.
    found = re.search(r"\n(?:[a-z]\w*\.)*(\w+.*)", rest if frame else f"\n{text}", re.DOTALL)
    raised = found[1] if found else text
    hint = re.search(r"Did you mean .*?\?", raised[200:], re.DOTALL)
    reason = " ".join([textwrap.shorten(raised, 200, placeholder=" …"), *([hint[0]] if hint else [])])
    lines = [line for file, line in re.findall(r'File "(.+?)", line (\d+)', text) if os.path.abspath(file) == path]
    place = f" (line {lines[-1]})" if lines else ""
    return ConfigError(
        f"--config={config} could not be used: {reason}{place} — give a file and preset such as {PRESET}"
    )
