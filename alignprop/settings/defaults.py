"""Builds the configuration with every field at its default. Presets change some of its values."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from alignprop.settings.fields import FIELDS
from alignprop.settings.fields.field import Field


def default_config() -> ConfigDict:
    """Returns the configuration with every field at its default. Each has its type, as the command line needs it."""
    config = ConfigDict()
    for field in FIELDS.values():
        *groups, name = field.name.split(".")
        place = config
        for group in groups:
            if group not in place:
                place[group] = ConfigDict()
            place = place[group]
        place[name] = _typed(field)
    return config


def _typed(field: Field) -> Any:
    """Returns the default, wrapped as ml_collections needs it if values of another type are allowed as well."""
    rule = field.rule
    if field.default is None:
        return config_dict.placeholder(rule.type)
    if rule.optional or rule.type is object:
        return config_dict.FieldReference(field.default, field_type=rule.type)
    return field.default
