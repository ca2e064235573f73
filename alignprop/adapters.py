"""The LoRA of a whole model: of its denoiser, and of its text encoders where they are trained too.

Its layers are named as in a file (parts.py), so that what mixes or scales a LoRA need not know where they belong.
"""

import torch

from alignprop.lora import (
    LoraWeights,
    add_lora,
    check_modules,
    get_lora,
    has_lora,
    set_lora,
    trainable_parameters,
    update_lora,
)
from alignprop.models.base import Model
from alignprop.parts import name_in_file, parts, place
from alignprop.settings import ConfigError

ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # a CLIP's attention, as in diffusers' training scripts


def add_adapter(model: Model, rank: int, alpha: float, target_modules, seed: int, text_encoders: bool = False) -> None:
    """Adds a trainable float32 adapter whose ΔW is zero to the denoiser, and to the text encoders where asked for.

    Raises:
        ConfigError: no layer of the denoiser has such a name, or the model's LoRA files hold no text encoder.
    """
    add_lora(model.denoiser, rank, alpha, target_modules or model.lora_targets, seed)
    if text_encoders and not model.lora_encoders:
        raise ConfigError(
            f"train_text_encoder = True: LoRA files of a {model.pipeline_class().__name__} have no place for one"
        )
    for name, encoder in model.lora_encoders.items() if text_encoders else ():
        add_lora(encoder, rank, alpha, ENCODER_TARGETS, seed, name)
        for parameter in trainable_parameters(encoder).values():
            parameter.data = parameter.data.to(model.device)  # where it stays: only what is frozen comes and goes


def trained_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """All that is trained, by its name in the state of a run."""
    return {
        prefix + name: parameter
        for prefix, module in parts(model).items()
        for name, parameter in trainable_parameters(module).items()
    }


def adapted_modules(model: Model) -> list[torch.nn.Module]:
    """The denoiser and the text encoders, as far as they have an adapter."""
    return [module for module in parts(model).values() if has_lora(module)]


def get_adapter(model: Model) -> LoraWeights:
    """The model's adapter, on the CPU."""
    found = {prefix: get_lora(module) for prefix, module in parts(model).items() if has_lora(module)}
    tensors = {name_in_file(prefix, name): t for prefix, part in found.items() for name, t in part.tensors.items()}
    return LoraWeights(tensors, found[""].scale)


def set_adapter(model: Model, weights: LoraWeights | None) -> None:
    """Replaces whatever adapter the model has by `weights`, frozen; None leaves the plain model.

    Raises:
        ConfigError: some of the adapter's tensors have no place in the model, or another shape.
    """
    found = split(model, weights) if weights else {}
    for prefix, module in parts(model).items():
        if prefix in found or has_lora(module):
            set_lora(module, found.get(prefix))


def update_adapter(model: Model, weights: LoraWeights) -> None:
    """Copies `weights` into the trainable adapter that the model already has.

    Raises:
        ConfigError: the two differ in their modules, rank or scale.
    """
    found = split(model, weights)
    for prefix, module in parts(model).items():
        if has_lora(module) != (prefix in found):
            has = "has no" if has_lora(module) else "has a"
            raise ConfigError(
                f"resume_from: the checkpoint {has} LoRA of the {prefix.rstrip('.') or 'denoiser'}; "
                "train_text_encoder differs"
            )
        if prefix in found:
            update_lora(module, found[prefix])


def split(model: Model, weights: LoraWeights) -> dict[str, LoraWeights]:
    """The adapters that `weights` is made of, by what precedes their layers in a file, with the names of their module.

    Raises:
        ConfigError: some of it has no place in the model, or another shape.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.tensors.items():
        prefix, inner = place(model, name)
        tensors.setdefault(prefix, {})[inner] = tensor
    found = {prefix: LoraWeights(part, weights.scale) for prefix, part in tensors.items()}
    for prefix, part in found.items():
        check_modules(parts(model)[prefix], part)
    return found
