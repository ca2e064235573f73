"""The rules for allowed values. A rule looks at one value alone and has the words for its error message."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from rewards.registry import Option


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        wanted: the words that complete "<field> = <value> must be …".
        accepts: returns whether a value is allowed.
        type: the type of the values, to which a value of the command line is converted.
        choices: the allowed values, if there are only a few.
        optional: whether None is allowed as well.
    """

    wanted: str
    accepts: Callable[[Any], bool]
    type: type
    choices: tuple[str, ...] = ()
    optional: bool = False


def choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(map(repr, names))}", lambda value: value in names, str, names)


def integer(low: int) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda v: _is_integer(v) and v >= low, int)


def number(
    *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf, at_most: float = math.inf
) -> Rule:
    """Returns the rule for a finite number within the limits. Whole numbers are allowed too."""
    limits = {"greater than": above, "at least": at_least, "less than": below, "at most": at_most}
    allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    return Rule(
        f"a finite number {allowed}".rstrip(),
        lambda v: _is_finite(v) and above < v < below and at_least <= v <= at_most,
        float,
    )


def boolean() -> Rule:
    return Rule("True or False", lambda value: isinstance(value, bool), bool)


def text(empty: bool = False) -> Rule:
    return Rule(
        "text" if empty else "text that is not empty",
        lambda value: isinstance(value, str) and (empty or bool(value.strip())),
        str,
    )


def sequence(of: str, accepts: Callable[[Any], bool], length: int | None = None) -> Rule:
    def accepts_all(value: Any) -> bool:
        right_length = isinstance(value, tuple | list) and (len(value) == length if length else len(value) > 0)
        return right_length and all(map(accepts, value))

    return Rule(f"{length or 'one or more'} {of}, separated by commas", accepts_all, tuple)


def optional(rule: Rule) -> Rule:
    return replace(rule, wanted=f"None or {rule.wanted}", accepts=lambda v: v is None or rule.accepts(v), optional=True)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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


def whole_number_to(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda v: _is_integer(v) and low <= v <= high, int)


def shares(length: int) -> Rule:
    """Returns the rule for `length` numbers from 0 to 1."""
    return sequence("numbers from 0 to 1", lambda v: _is_finite(v) and 0 <= v <= 1, length)


def option(of: Option) -> Rule:
    """Returns the rule for one option of a built-in reward."""
    low, high = of.limits or (-math.inf, math.inf)
    if of.choices:
        rule = choice(*of.choices)
    elif of.type is tuple:
        limits = f"numbers from {low:g} to {high:g}" if of.limits else "finite numbers"
        rule = sequence(limits, lambda v: _is_finite(v) and low <= v <= high, of.length)
    elif of.type is int:
        rule = whole_number_to(int(low), int(high)) if of.limits else Rule("a whole number", _is_integer, int)
    elif of.type is float:
        rule = number(above=low, below=high) if of.exclusive else number(at_least=low, at_most=high)
    else:
        rule = boolean() if of.type is bool else text()
    return optional(rule) if of.optional else rule


def picture_sizes(value: int | str | tuple[int | str, ...] | None) -> list[tuple[int, int]]:
    """Returns the (height, width) of pictures in pixels, the size with the most pixels first; [] for None.

    Args:
        value: a side, or "WIDTHxHEIGHT", or several of these, as a sequence or as text with commas.

    Raises:
        ValueError: the value is none of these.
    """
    if value is None:
        return []
    sizes: list[tuple[int, int]] = []
    for text in map(str, value if isinstance(value, tuple | list) else str(value).split(",")):
        width, _, height = text.lower().partition("x")
        sizes.append((int(height or width), int(width)))
    return sorted(sizes, key=math.prod, reverse=True)


def size_name(size: tuple[int, int]) -> str:
    """Returns the text for a size (height, width): the side of a square, or "WIDTHxHEIGHT"."""
    height, width = size
    return str(width) if width == height else f"{width}x{height}"


def _is_size(value: Any) -> bool:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, tuple | list) else [value]
    return bool(parts) and all(map(_is_one_size, parts))


def _is_one_size(value: Any) -> bool:
    is_text = isinstance(value, str) and re.fullmatch(r"\d+([xX]\d+)?", value.strip(), re.ASCII) is not None
    return (is_text or _is_integer(value)) and min(picture_sizes(value)[0]) >= 16


COUNT = integer(1)
SIZES = Rule(
    "a side of at least 16 pixels, or WIDTHxHEIGHT, or several of these with commas, for example '768x512,512x768'",
    _is_size,
    object,
)
QUANTIZED = choice("", "int8", "fp8", "int4", "nf4")
NAMES = sequence("names of layers", _is_name)
INTEGERS = sequence("whole numbers", _is_integer, length=2)
NUMBERS = sequence("finite numbers", _is_finite)
FOLDER_NAME = Rule("a plain folder name of at most 200 bytes, without / and \\", _is_folder_name, str)
REPO_NAME = Rule(
    "empty or 'user/name', each part of at most 96 letters, digits, '_', '-' and '.', as the hub allows",
    lambda value: value == "" or is_repo_name(value),
    str,
)
COUNT_OR_AUTO = Rule(f"'auto' or {COUNT.wanted}", lambda v: v == "auto" or COUNT.accepts(v), object)
