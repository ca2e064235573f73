"""The rules for allowed values. A rule looks at one value alone and has the words for its error message."""

import math
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
    return Rule(
        f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names, str, names
    )


def integer(low: int) -> Rule:
    return Rule(f"a whole number of at least {low}", lambda v: is_integer(v) and v >= low, int)


def number(
    *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf, at_most: float = math.inf
) -> Rule:
    """Returns the rule for a finite number within the limits. Whole numbers are allowed too."""
    limits = {"greater than": above, "at least": at_least, "less than": below, "at most": at_most}
    allowed = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))
    return Rule(
        f"a finite number {allowed}".rstrip(),
        lambda v: is_finite(v) and above < v < below and at_least <= v <= at_most,
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


def whole_number_to(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda v: is_integer(v) and low <= v <= high, int)


def option_rule(of: Option) -> Rule:
    """Returns the rule for one option of a built-in reward."""
    low, high = of.limits or (-math.inf, math.inf)
    if of.choices:
        rule = choice(*of.choices)
    elif of.type is tuple:
        limits = f"numbers from {low:g} to {high:g}" if of.limits else "finite numbers"
        rule = sequence(limits, lambda v: is_finite(v) and low <= v <= high, of.length)
    elif of.type is int:
        rule = whole_number_to(int(low), int(high)) if of.limits else Rule("a whole number", is_integer, int)
    elif of.type is float:
        rule = number(above=low, below=high) if of.exclusive else number(at_least=low, at_most=high)
    else:
        rule = boolean() if of.type is bool else text()
    return optional(rule) if of.optional else rule


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
