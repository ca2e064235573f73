"""Fields that a person set and that do nothing in the configuration at hand."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from alignprop.settings.fields import FIELDS


def warnings_for(config: ConfigDict, overridden: Iterable[str]) -> list[str]:
    """One line for each field that a person set and that has no effect in this configuration."""
    lines = []
    for name in overridden:
        unmet = [effect for effect in FIELDS[name].effects if not effect.holds(config)] if name in FIELDS else []
        if unmet:
            lines.append(f"{name} has no effect: {unmet[0].reason(config)}")
    return lines
