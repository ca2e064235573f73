"""The error for mistakes in a configuration, and the check that a value is one of a few."""

import difflib
from collections.abc import Iterable

from rewards.errors import UserError


class ConfigError(UserError):
    """A mistake in what the user asked for. Its text is one line that says what is allowed.

    It is not a ValueError, because absl wraps a ValueError of a preset again, together with the traceback.
    """


def one_of(field: str, value: str, allowed: Iterable[str]) -> str:
    """Returns `value` if it is allowed.

    Raises:
        ConfigError: it is not. The message has the field, the allowed values and the nearest one.
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{field} = {value!r} is not one of {', '.join(map(repr, allowed))}{hint}")
