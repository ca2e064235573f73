"""The modules of a model that a LoRA can adapt, and what a LoRA's file calls their layers.

Layers of the denoiser go by their names in it, those of a text encoder with its name before, as in diffusers' files:
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
"""

import torch

from alignprop.models.base import Model

_WRAPPER = "text_model"  # in a file's names; not every version of transformers has a module of that name


def parts(model: Model) -> dict[str, torch.nn.Module]:
    """The denoiser and the text encoders that LoRA files have a place for, by what precedes their layers there."""
    return {"": model.denoiser} | {f"{name}.": encoder for name, encoder in model.lora_encoders.items()}


def place(model: Model, name: str) -> tuple[str, str]:
    """(what precedes the layers of its part, the name in that part) of a layer, or of its factors, in a file."""
    prefix = next((p for p in parts(model) if p and name.startswith(p)), "")
    name = name.removeprefix(prefix)
    if prefix and not hasattr(parts(model)[prefix], _WRAPPER):
        name = name.removeprefix(f"{_WRAPPER}.")
    return prefix, name


def name_in_file(prefix: str, name: str) -> str:
    """The inverse of `place`."""
    wrapped = not prefix or name.startswith(f"{_WRAPPER}.")
    return prefix + name if wrapped else f"{prefix}{_WRAPPER}.{name}"


def layer(model: Model, name: str) -> torch.nn.Module:
    """The layer that a file calls so."""
    prefix, inner = place(model, name)
    return parts(model)[prefix].get_submodule(inner)
