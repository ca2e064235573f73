"""The LoRA of a whole model: of its denoiser, and of its text encoders if they are trained too.

Its layers have the same names as in a file (networks.py), so that code that mixes or scales a LoRA need not know
which network a layer belongs to.
"""

import torch

from alignprop.lora.factors import (
    LoraWeights,
    add_lora,
    check_modules,
    get_lora,
    has_lora,
    set_lora,
    start_lora,
    trainable_parameters,
    update_lora,
)
from alignprop.lora.networks import adaptable_networks, locate, name_in_file
from alignprop.models.base import Model
from alignprop.models.loading import no_place_for_encoders
from alignprop.settings.errors import ConfigError

ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # CLIP's attention, as in diffusers' training scripts.


def add_adapter(
    model: Model, rank: int, alpha: float, target_modules, seed: int, text_encoders: bool = False,
    initialization: str = "kaiming",
) -> None:  # fmt: skip
    """Adds a trainable float32 adapter with ΔW = 0 to the denoiser and, if `text_encoders`, to the text encoders.

    Raises:
        ConfigError: no layer of the denoiser has such a name, or the model's LoRA files cannot hold a text encoder.
    """
    add_lora(model.denoiser, rank, alpha, target_modules or model.lora_targets, seed, initialization=initialization)
    if text_encoders and not model.lora_encoders:
        raise no_place_for_encoders(model.pipeline_class().__name__)
    for name, encoder in model.lora_encoders.items() if text_encoders else ():
        add_lora(encoder, rank, alpha, ENCODER_TARGETS, seed, name, initialization)
        for parameter in trainable_parameters(encoder).values():
            parameter.data = parameter.data.to(model.device)  # It stays there: only frozen tensors come and go.


def trained_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """Returns all trained parameters, by their names in the state of a run."""
    return {
        name_in_file(model, part, name): parameter
        for part, module in adaptable_networks(model).items()
        for name, parameter in trainable_parameters(module).items()
    }


def adapted_networks(model: Model) -> list[torch.nn.Module]:
    """Returns those of the denoiser and the text encoders that have an adapter."""
    return [module for module in adaptable_networks(model).values() if has_lora(module)]


def get_adapter(model: Model) -> LoraWeights:
    """Returns the model's adapter, on the CPU."""
    loras = {part: get_lora(module) for part, module in adaptable_networks(model).items() if has_lora(module)}
    tensors = {name_in_file(model, part, n): t for part, lora in loras.items() for n, t in lora.tensors.items()}
    return LoraWeights(tensors, loras[""].scale)


def set_adapter(model: Model, weights: LoraWeights | None) -> None:
    """Replaces the model's adapter, if any, by `weights`, which are frozen. None leaves the model without an adapter.

    Raises:
        ConfigError: some of the adapter's tensors have no place in the model, or have another shape.
    """
    loras = split(model, weights) if weights else {}
    for part, module in adaptable_networks(model).items():
        if part in loras or has_lora(module):
            set_lora(module, loras.get(part))


def update_adapter(model: Model, weights: LoraWeights) -> None:
    """Copies `weights` into the trainable adapter that the model already has.

    Raises:
        ConfigError: the two differ in their modules, rank or scale.
    """
    loras = split(model, weights)
    for part, module in adaptable_networks(model).items():
        if has_lora(module) != (part in loras):
            has = "no" if has_lora(module) else "a"
            raise ConfigError(
                f"resume_from: the checkpoint has {has} LoRA for the {part or 'denoiser'}, but this run has "
                f"train_text_encoder = {has_lora(module)}"
            )
        if part in loras:
            update_lora(module, loras[part])


def start_from(model: Model, weights: LoraWeights) -> None:
    """Sets the ΔW of the trainable adapter that the model already has to that of `weights`.

    Raises:
        ConfigError: `weights` have layers that the adapter does not have, or a larger rank, or are for another model.
    """
    for part, lora in split(model, weights).items():
        module = adaptable_networks(model)[part]
        if not has_lora(module):
            raise ConfigError(f"init_lora has a LoRA for the {part}, but this run has train_text_encoder = False")
        start_lora(module, lora)


def split(model: Model, weights: LoraWeights) -> dict[str, LoraWeights]:
    """Splits `weights` into the adapters of the single networks, by part (lora/networks.py).

    Layers then have the names that they have in their network.

    Raises:
        ConfigError: some of the tensors have no place in the model, or have another shape.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.tensors.items():
        part, inner = locate(model, name)
        tensors.setdefault(part, {})[inner] = tensor
    loras = {part: LoraWeights(factors, weights.scale) for part, factors in tensors.items()}
    for part, lora in loras.items():
        check_modules(adaptable_networks(model)[part], lora, f"model's {part}" if part else "model")
    return loras
