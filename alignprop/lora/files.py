"""LoRA files: diffusers' own `pytorch_lora_weights.safetensors`, and what else is read."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignprop.lora.factors import LoraWeights
from alignprop.lora.foreign import read_foreign
from alignprop.lora.layouts import Factors, diffusers_name, parse, place
from alignprop.lora.scales import PEFT_FILE, stated_scales
from alignprop.settings.errors import ConfigError

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_lora(model, weights: LoraWeights, folder) -> None:
    """Writes `weights` so that `model.pipeline_class.load_lora_weights(folder)` reads them."""
    model.save_lora(folder, weights.tensors, weights.scale)


def read_lora(path, model=None) -> LoraWeights:
    """Reads an adapter from a file, or from a folder that holds one.

    Its layout may be any of lora/layouts.py, and any other that diffusers converts for the model's pipeline
    (foreign.py). Among them are the attention-processor keys (`….processor.to_q_lora.down.weight`) of AlignProp's
    released checkpoints, which diffusers' `load_lora_weights` silently ignores.

    Args:
        model: that it is for, on any device. Without one, layers have to be named as diffusers does.

    Raises:
        ConfigError: no such file, not a whole safetensors file, numbers that are not finite, not a LoRA, or not of
            this model.
    """
    path = find_lora(path)
    source = repr(str(path))
    raw, metadata = _read_tensors(path)
    layers = parse(raw, source)
    scales = stated_scales(layers, metadata, path)
    layers = {name: replace(factors, scale=scales[name]) for name, factors in layers.items()}
    if model is None:
        return _weights({diffusers_name(name): factors for name, factors in layers.items()})
    placed, unknown = place(layers, model, source)
    if unknown and model.denoiser_name == "unet":  # of which diffusers knows no other names than we do
        raise ConfigError(
            f"{source}: {len(layers) - len(unknown)} of its {len(layers)} layers are this model's, {len(unknown)} are "
            f"not, for example {unknown[0]!r} — is it from another base model?"
        )
    theirs = {key: raw[key] for name in unknown for key in layers[name].keys}
    return _weights(placed | (read_foreign(theirs, model, source) if theirs else {}))


def find_lora(path) -> Path:
    """The LoRA file that a path is of: itself, or the one in that folder.

    Raises:
        ConfigError: there is none, or one has to be chosen.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    known = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
    found = known or sorted(path.glob("*.safetensors")) or [path / LORA_FILE]
    if len(found) > 1 and not known:
        raise ConfigError(f"{str(path)!r} holds several files, name one: {', '.join(file.name for file in found)}")
    return found[0]


def _weights(layers: dict[str, Factors]) -> LoraWeights:
    """With one scale for all layers where they have the same, and else with each one's in its B."""
    scales = {factors.scale for factors in layers.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for name, factors in layers.items():
        up = factors.up if factors.scale == common else factors.scale * factors.up
        tensors |= {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": up}
    return LoraWeights(tensors, common)


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors in float32, and the header."""
    if not path.is_file():
        raise ConfigError(f"no LoRA file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        # A pickle (.bin, .pt, .ckpt) could run code, so it is not even tried.
        raise ConfigError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    check_finite(tensors, repr(str(path)))
    return tensors, metadata


def check_finite(tensors: dict[str, torch.Tensor], source: str) -> None:
    """
    Args:
        source: what the tensors are of, as a message begins.

    Raises:
        ConfigError: some are not finite.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ConfigError(f"{source}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, such as {bad[0]!r}")
