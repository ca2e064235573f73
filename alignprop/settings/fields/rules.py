"""The rules of the configuration's fields that the options of rewards do not have."""

import os
import re
from typing import Any

from alignprop.settings.sizes import is_size
from rewards.rules import Rule, choice, integer, is_finite, is_integer, sequence


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_folder_name(value: Any) -> bool:
    """Whether a value is empty or a file name on any system, short enough that a suffix can be appended to it."""
    if not isinstance(value, str) or value in (".", "..") or len(os.fsencode(value)) > 200:
        return False
    return not any(character in "/\\" or ord(character) < 32 for character in value)


def is_repo_name(value: Any) -> bool:
    """Whether the Hugging Face hub allows a repository of that name, "user/name"."""
    part = r"\w([\w.-]{0,94}\w)?"
    named = isinstance(value, str) and re.fullmatch(f"{part}/{part}", value, re.ASCII) is not None
    return named and not ("--" in value or ".." in value or value.endswith(".git"))


def shares(length: int) -> Rule:
    """Returns the rule for `length` numbers from 0 to 1."""
    return sequence("numbers from 0 to 1", lambda v: is_finite(v) and 0 <= v <= 1, length)


COUNT = integer(1)
SIZES = Rule(
    "a side of at least 16 pixels, or WIDTHxHEIGHT, or several of these with commas, for example '768x512,512x768'",
    is_size,
    object,
)
QUANTIZED = choice("", "int8", "fp8", "int4", "nf4")
NAMES = sequence("names of layers", _is_name)
INTEGERS = sequence("whole numbers", is_integer, length=2)
NUMBERS = sequence("finite numbers", is_finite)
FOLDER_NAME = Rule("a plain folder name of at most 200 bytes, without / and \\", _is_folder_name, str)
REPO_NAME = Rule(
    "empty or 'user/name', each part of at most 96 letters, digits, '_', '-' and '.', as the hub allows",
    lambda value: value == "" or is_repo_name(value),
    str,
)
COUNT_OR_AUTO = Rule(f"'auto' or {COUNT.wanted}", lambda v: v == "auto" or COUNT.accepts(v), object)
