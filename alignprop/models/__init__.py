"""The model families, by name."""

from importlib import import_module

FAMILIES = {"sd": ("alignprop.models.sd", "StableDiffusion")}


def load_model(name: str, *, family: str = "sd", **options):
    """Loads a text-to-image model; see the family's own `load` for what the options do and what is raised."""
    module, cls = FAMILIES[family]
    return getattr(import_module(module), cls).load(name, **options)
