"""The networks of a model that a LoRA can adapt, and the names that their layers have in a LoRA file.

A layer of the denoiser has its own name. A layer of a text encoder has the encoder's name before it, as in diffusers'
files:
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

import torch

from alignprop.models.base import Model, split_name

_WRAPPER = "text_model"  # in a file's names; not every version of transformers has a module of that name


def adaptable_networks(model: Model) -> dict[str, torch.nn.Module]:
    """The denoiser, as "", and the text encoders that LoRA files have a place for, by their names."""
    return {"": model.denoiser, **model.lora_encoders}


def locate(model: Model, name: str) -> tuple[str, str]:
    """(which part, the name in it) of a layer, or of its factors, in a file; "" where it is of no part."""
    part, inner = split_name(name)
    if part not in adaptable_networks(model):
        return "", name
    return part, inner if not part or _has_wrapper(model, part) else inner.removeprefix(f"{_WRAPPER}.")


def name_in_file(model: Model, part: str, name: str) -> str:
    """The inverse of `locate`."""
    if not part:
        return name
    return f"{part}.{name}" if _has_wrapper(model, part) else f"{part}.{_WRAPPER}.{name}"


def layer(model: Model, name: str) -> torch.nn.Module:
    """The layer that a file calls so."""
    part, inner = locate(model, name)
    return adaptable_networks(model)[part].get_submodule(inner)


def _has_wrapper(model: Model, part: str) -> bool:
    return hasattr(adaptable_networks(model)[part], _WRAPPER)
