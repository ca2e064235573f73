"""The flags of main.py. Errors of absl and ml_collections about them become one-line messages."""

import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.settings.fields.field import Field
from alignprop.settings.resolve import check_name
from alignprop.settings.warnings import warnings_for

KNOWN_GPUS = ("h100", "a100", "4090", "3090", "4060ti")  # memory/gpus.py describes them
PRESET = "config/align_prop.py:quickstart"
_NONES: list[str] = []  # the fields to which the command line gives None


def define_flags(argv: list[str]) -> None:
    """Defines `--config`, `--plan`, `--gpu_memory` and `--gpu`.

    Args:
        argv: `sys.argv`, in which ml_collections looks for overrides. It is changed in place: each --flagfile is
            replaced by the flags in the file, and lists are rewritten in Python's notation.

    Raises:
        ConfigError: a field does not exist, or a list is given twice.
    """
    with _plain_errors():
        argv[:] = with_files(argv)
        names = [match[1] for argument in argv[1:] if (match := re.match(r"--?(?:no)?config\.([^=]+)", argument))]
        for name in names:
            check_name(name)
            # ml_collections joins repeated lists into one list. Of any other repeated field it takes the last value.
            if name in FIELDS and FIELDS[name].rule.type is tuple and names.count(name) > 1:
                raise ConfigError(f"{name} is given twice")
        argv[:], _NONES[:] = without_nones(with_lists(argv))
        config_flags.DEFINE_config_file("config", PRESET, "Configuration file and preset to run.")
        flags.DEFINE_bool("plan", False, "Print what training will cost with each memory policy, and end.")
        flags.DEFINE_float("gpu_memory", None, "With --plan: GiB of the GPU to plan for.", lower_bound=0.1)
        flags.DEFINE_enum("gpu", None, KNOWN_GPUS, "With --plan: the GPU to plan for, with seconds.")


def with_files(argv: list[str]) -> list[str]:
    """Returns the arguments, with each --flagfile replaced by the flags in the file."""
    return [*argv[:1], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]


def with_lists(argv: list[str]) -> list[str]:
    """Returns the arguments, with lists rewritten in Python's notation, which ml_collections reads."""
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


def without_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without those that give None to a field that may be None, and the names of these fields.

    ml_collections reads a value in the type of the preset's value. So it refuses None where a preset has a number.
    """
    left, last, i = [], {}, 0  # of a field that is given several times, the last value counts
    while i < len(argv):
        flag, equals, value = argv[i].partition("=")
        name = re.sub(r"^--?(no)?config\.", "", flag)
        if name != flag and name in FIELDS and FIELDS[name].rule.optional:
            is_alone = equals or FIELDS[name].rule.type is bool  # --config.name=value, --config.name or --noconfig.name
            words = argv[i : i + (1 if is_alone else 2)]
            last[name] = [] if (value if equals else words[-1]) == "None" else words
            i += len(words)
        else:
            left.append(argv[i])
            i += 1
    given = [word for words in last.values() for word in words]
    return [*left, *given], [name for name, words in last.items() if not words]


def _list_literal(text: str, field: Field) -> str:
    """'to_q,to_out.0' -> "('to_q', 'to_out.0')", '0,1' -> '(0, 1)'. Brackets, quotes and spaces are optional."""
    inside = re.sub(r"^([(\[])(.*)[)\]]$", r"\2", text.strip())
    words = tuple(word.strip().strip("'\"") for word in inside.split(",") if word.strip())
    values = (words, tuple(map(_number, words)))
    # A wrong value stays as it was typed, because the error message shows it.
    return next((repr(value) for value in values if text.strip() != "None" and field.rule.accepts(value)), text)


def _number(word: str) -> int | float | str:
    """Returns the word as a number if it is one, and else the word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags when absl calls it, and returns the arguments that are not flags."""
    with _plain_errors():
        arguments = flags.FLAGS(argv)
        config = flags.FLAGS.config
        _ = config.task  # a configuration that could not be loaded raises only when it is used
        config.update_from_flattened_dict(dict.fromkeys(_NONES))
    return list(arguments)


def check_flags(arguments: list[str], config: ConfigDict) -> None:
    """Refuses arguments that are not flags, and flags that contradict each other.

    Raises:
        ConfigError: names the flag.
    """
    plan, gpu_memory = flags.FLAGS.plan, flags.FLAGS.gpu_memory
    if len(arguments) > 1:
        raise ConfigError(f"{arguments[1]!r} is not a flag; options look like --config.seed=1")
    for name in ("gpu_memory", "gpu"):
        if flags.FLAGS[name].value and not plan:
            raise ConfigError(f"--{name} needs --plan")
    if gpu_memory and not math.isfinite(gpu_memory):
        raise ConfigError(f"--gpu_memory = {gpu_memory} must be a finite number of GiB")
    if plan and config.task != "train":
        raise ConfigError(f"--plan is about training, and task = {config.task!r} does not train")
    if plan and config.algorithm == "ddpo":
        raise ConfigError("--plan is about back-propagation, and algorithm = 'ddpo' has none")


def warn_of_unused(config: ConfigDict) -> None:
    """Prints a warning for each given field that has no effect. Only the process of rank 0 prints."""
    names = [*config_flags.get_override_values(flags.FLAGS["config"]), *_NONES]
    for line in warnings_for(config, names) if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {line}", file=sys.stderr)


def quiet_libraries() -> None:
    """Turns off the progress bars of loading, which takes only seconds. Downloads and the run keep their bars."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns the many kinds of errors of absl and ml_collections into a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except flags.Error as error:
        if "Traceback" in str(error):  # ml_collections puts the traceback of the file's TypeError into the text
            raise _file_error(str(error)) from error
        raise ConfigError(_flag_error(" ".join(str(error).removeprefix("ERROR:: ").split()))) from error
    except Exception as error:  # a configuration file can raise anything
        raise _file_error("".join(traceback.format_exception(error.__cause__ or error))) from error


def _flag_error(text: str) -> str:
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if wrong and wrong[1] in FIELDS:
        return f"{wrong[1]} = {wrong[2]!r} must be {FIELDS[wrong[1]].rule.wanted}"
    return f"{text}; options look like --config.seed=1"


def _file_error(text: str) -> ConfigError:
    """Returns the error for a configuration file that could not be used, with the cause and the line of the file.

    Args:
        text: the traceback.
    """
    option = re.search(r"(?:^| )--?config[= ](\S+)", " ".join(sys.argv))
    config = option[1] if option else PRESET
    path = os.path.abspath(config.partition(":")[0])
    _, frame, rest = text.rpartition('File "')
    # The exception is in the first line after the frames that is not indented.
    found = re.search(r"\n(?:[a-z]\w*\.)*(\w+.*)", rest if frame else f"\n{text}", re.DOTALL)
    raised = found[1] if found else text
    hint = re.search(r"Did you mean .*?\?", raised[200:], re.DOTALL)
    reason = " ".join([textwrap.shorten(raised, 200, placeholder=" …"), *([hint[0]] if hint else [])])
    lines = [line for file, line in re.findall(r'File "(.+?)", line (\d+)', text) if os.path.abspath(file) == path]
    place = f" (line {lines[-1]})" if lines else ""
    return ConfigError(
        f"--config={config} could not be used: {reason}{place} — give a file and preset such as {PRESET}"
    )
