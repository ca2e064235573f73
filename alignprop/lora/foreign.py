"""Reads LoRA layers in other layouts, if diffusers converts them for the model's pipeline.

Layouts that lora/layouts.py reads are not converted here, because diffusers assumes the released width for FLUX.1 and
drops layers that it has no place for without an error.
"""

from dataclasses import replace

import torch

from alignprop.lora.layouts import Factors, diffusers_name, parse
from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError


def read_foreign(raw: dict[str, torch.Tensor], model: Model, source: str) -> dict[str, Factors]:
    """Returns the layers by their names in diffusers. Does not check whether the model has such layers.

    Args:
        raw: the tensors of some layers of a file.
        model: the model that the LoRA is for; its pipeline's `lora_state_dict` converts the layers.
        source: the file's name in error messages.

    Raises:
        ConfigError: diffusers does not know the layout, or does not convert all of it.
    """
    cls = model.pipeline_class()
    try:
        answer = cls.lora_state_dict(dict(raw))
    except Exception as error:  # The readers of diffusers raise many kinds of errors.
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"{source}: diffusers cannot convert this layout for a {cls.__name__} ({reason})") from error
    converted, alphas = answer[:2] if isinstance(answer, tuple) else (answer, None)
    if alphas or not converted:
        raise ConfigError(f"{source}: diffusers cannot convert this layout for a {cls.__name__}, such as {min(raw)!r}")
    layers = parse(converted, source)
    return {diffusers_name(name): replace(f, scale=1.0 if f.scale is None else f.scale) for name, f in layers.items()}
