"""The LoRA of a whole model: of its denoiser, and of its text encoders where they are trained too.

Layers are named as in diffusers' files: those of the denoiser by their names in it, those of a text encoder with its
name before, `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. What mixes or scales a LoRA need not know.
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
from alignprop.settings import ConfigError

ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # a CLIP's attention, as in diffusers' training scripts
_WRAPPER = "text_model."  # in a file's names; some versions of transformers have no module of that name


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
        for prefix, module in _parts(model).items()
        for name, parameter in trainable_parameters(module).items()
    }


def adapted_modules(model: Model) -> list[torch.nn.Module]:
    """The denoiser and the text encoders, as far as they have an adapter."""
    return [module for module in _parts(model).values() if has_lora(module)]


def get_adapter(model: Model) -> LoraWeights:
    """The model's adapter, on the CPU."""
    found = {prefix: get_lora(module) for prefix, module in _parts(model).items() if has_lora(module)}
    tensors = {_in_file(prefix, name): t for prefix, part in found.items() for name, t in part.tensors.items()}
    return LoraWeights(tensors, found[""].scale)


def set_adapter(model: Model, weights: LoraWeights | None) -> None:
    """Replaces whatever adapter the model has by `weights`, frozen; None leaves the plain model.

    Raises:
        ConfigError: some of the adapter's tensors have no place in the model, or another shape.
    """
    parts = split(model, weights) if weights else {}
    for prefix, module in _parts(model).items():
        if prefix in parts or has_lora(module):
            set_lora(module, parts.get(prefix))


def update_adapter(model: Model, weights: LoraWeights) -> None:
    """Copies `weights` into the trainable adapter that the model already has.

    Raises:
        ConfigError: the two differ in their modules, rank or scale.
    """
    parts = split(model, weights)
    for prefix, module in _parts(model).items():
        if has_lora(module) != (prefix in parts):
            has = "has no" if has_lora(module) else "has a"
            raise ConfigError(
                f"resume_from: the checkpoint {has} LoRA of the {prefix.rstrip('.') or 'denoiser'}; "
                "train_text_encoder differs"
            )
        if prefix in parts:
            update_lora(module, parts[prefix])


def split(model: Model, weights: LoraWeights) -> dict[str, LoraWeights]:
    """The adapters that `weights` is made of, by the prefix of their module, with the names of its layers.

    Raises:
        ConfigError: some of it has no place in the model, or another shape.
    """
    parts, tensors = _parts(model), {}
    for name, tensor in weights.tensors.items():
        prefix = next((p for p in parts if p and name.startswith(p)), "")
        tensors.setdefault(prefix, {})[_in_module(parts[prefix], name.removeprefix(prefix))] = tensor
    found = {prefix: LoraWeights(part, weights.scale) for prefix, part in tensors.items()}
    for prefix, part in found.items():
        check_modules(parts[prefix], part)
    return found


def layer(model: Model, name: str) -> torch.nn.Module:
    """The layer that a LoRA calls so."""
    parts = _parts(model)
    prefix = next((p for p in parts if p and name.startswith(p)), "")
    return parts[prefix].get_submodule(_in_module(parts[prefix], name.removeprefix(prefix)))


def _parts(model: Model) -> dict[str, torch.nn.Module]:
    return {"": model.denoiser} | {f"{name}.": encoder for name, encoder in model.lora_encoders.items()}


def _in_module(module: torch.nn.Module, name: str) -> str:
    return name if hasattr(module, _WRAPPER.rstrip(".")) else name.removeprefix(_WRAPPER)


def _in_file(prefix: str, name: str) -> str:
    return prefix + name if not prefix or name.startswith(_WRAPPER) else prefix + _WRAPPER + name
