"""Warnings about fields that the user set and that have no effect in the configuration."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from alignprop.settings.fields import FIELDS


def warnings_for(config: ConfigDict, overridden: Iterable[str]) -> list[str]:
    """Returns a line for each field that has no effect in this configuration although the user set it.

    Args:
        config: the configuration.
        overridden: the names of the fields that the user set.
    """
    lines = []
    for name in overridden:
        unmet = [effect for effect in FIELDS[name].effects if not effect.holds(config)] if name in FIELDS else []
        if unmet:
            lines.append(f"{name} has no effect: {unmet[0].reason(config)}")
    return lines
