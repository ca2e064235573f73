"""LoRA layers in whatever other layout diffusers converts for the model's pipeline.

What lora/layouts.py reads does not come here: for FLUX.1 diffusers takes the released width for granted, and it drops
what it has no place for without an error.
"""

from dataclasses import replace

import torch

from alignprop.lora.layouts import Factors, diffusers_name, parse
from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError


def read_foreign(raw: dict[str, torch.Tensor], model: Model, source: str) -> dict[str, Factors]:
    """The layers by diffusers' names of them; whether the model has them is not checked.

    Args:
        raw: the tensors of some layers of a file.
        model: that it is for; its pipeline's `lora_state_dict` converts them.
        source: the file, for errors.

    Raises:
        ConfigError: diffusers does not know the layout, or does not convert all of it.
    """
    cls = model.pipeline_class()
    try:
        answer = cls.lora_state_dict(dict(raw))
    except Exception as error:  # its readers fail in many ways
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"{source}: diffusers cannot convert this layout for a {cls.__name__} ({reason})") from error
    converted, alphas = answer[:2] if isinstance(answer, tuple) else (answer, None)
    if alphas or not converted:
        raise ConfigError(f"{source}: diffusers cannot convert this layout for a {cls.__name__}, such as {min(raw)!r}")
    layers = parse(converted, source)
    return {diffusers_name(name): replace(f, scale=1.0 if f.scale is None else f.scale) for name, f in layers.items()}
