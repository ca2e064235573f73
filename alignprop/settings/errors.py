"""The mistakes that a person can make in a configuration, and how they are told."""

import difflib
from collections.abc import Iterable

from rewards.errors import UserError


class ConfigError(UserError):
    """A mistake in what the user asked for; its text is one line that says what is allowed.

    Not a ValueError, which absl would rewrap with our traceback when a preset raises it.
    """


def one_of(field: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is allowed; else a ConfigError that names the field and the nearest allowed value."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{field} = {value!r} is not one of {', '.join(map(repr, allowed))}{hint}")
