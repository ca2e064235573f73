"""The networks of a model that a LoRA can adapt, and the names that their layers have in a LoRA file.

A layer of the denoiser has the same name in a file as in the denoiser. The name of a text encoder's layer begins with
the encoder's name, as in diffusers' files: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

import torch

from alignprop.models.base import Model, split_name

_WRAPPER = "text_model"  # Names in files contain it, but not every version of transformers has a module of that name.


def adaptable_networks(model: Model) -> dict[str, torch.nn.Module]:
    """Returns the denoiser under the name "", and by name the text encoders that the model's LoRA files can hold."""
    return {"": model.denoiser, **model.lora_encoders}


def locate(model: Model, name: str) -> tuple[str, str]:
    """Splits the name of a layer, or of a factor, in a file into (part, name in it); the denoiser is the part ""."""
    part, inner = split_name(name)
    if part not in adaptable_networks(model):
        return "", name
    return part, inner if not part or _has_wrapper(model, part) else inner.removeprefix(f"{_WRAPPER}.")


def name_in_file(model: Model, part: str, name: str) -> str:
    """Returns a layer's name in a file; the inverse of `locate`."""
    if not part:
        return name
    return f"{part}.{name}" if _has_wrapper(model, part) else f"{part}.{_WRAPPER}.{name}"


def layer(model: Model, name: str) -> torch.nn.Module:
    """Returns the layer that has this name in a file."""
    part, inner = locate(model, name)
    return adaptable_networks(model)[part].get_submodule(inner)


def _has_wrapper(model: Model, part: str) -> bool:
    return hasattr(adaptable_networks(model)[part], _WRAPPER)
