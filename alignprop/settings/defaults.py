"""The configuration with every field at its default, from which presets differ."""

from ml_collections import ConfigDict, config_dict

from alignprop.settings.fields import FIELDS
from alignprop.settings.fields.field import Field


def default_config() -> ConfigDict:
    """Every field of the configuration at its default, with its type, so that it can be given on the command line."""
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


def _typed(field: Field):
    """The default; where a value of another type is allowed, too, in what ml_collections makes of that."""
    rule = field.rule
    if field.default is None:
        return config_dict.placeholder(rule.type)
    if rule.optional or rule.type is object:
        return config_dict.FieldReference(field.default, field_type=rule.type)
    return field.default
