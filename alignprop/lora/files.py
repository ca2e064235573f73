"""Reads LoRA files of many formats, and writes diffusers' own `pytorch_lora_weights.safetensors`."""

import os
from contextlib import suppress
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
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def save_lora(model, weights: LoraWeights, folder) -> None:
    """Writes `weights` so that `model.pipeline_class.load_lora_weights(folder)` reads them."""
    model.save_lora(folder, weights.tensors, weights.scale)
    make_readable(Path(folder))


def make_readable(path: Path) -> None:
    """Gives a safetensors file, or those in a folder, the permissions that other new files get.

    safetensors lets only the owner read what it writes, but a LoRA is often read by a service of another user.
    """
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        with suppress(OSError):  # some file systems have no permissions
            file.chmod(0o666 & ~_UMASK)


def read_lora(path, model=None) -> LoraWeights:
    """Reads an adapter from a file, or from a folder that holds one.

    The file may have any layout of lora/layouts.py, or any other layout that diffusers converts for the model's
    pipeline (foreign.py). These include the attention-processor keys (`….processor.to_q_lora.down.weight`) of
    AlignProp's released checkpoints, which diffusers' `load_lora_weights` silently ignores.

    Args:
        path: the file or the folder.
        model: the model that the LoRA is for, on any device. Without it, layers must have diffusers' names.

    Raises:
        ConfigError: there is no such file, it is not a whole safetensors file, some numbers are not finite, it is not
            a LoRA, or it is for another model.
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
    if unknown and model.denoiser_name == "unet":  # For a UNet, diffusers knows no names that `place` does not know.
        raise ConfigError(
            f"{source}: {len(layers) - len(unknown)} of its {len(layers)} layers are this model's, {len(unknown)} are "
            f"not, for example {unknown[0]!r} — is it from another base model?"
        )
    theirs = {key: raw[key] for name in unknown for key in layers[name].keys}
    return _weights(placed | (read_foreign(theirs, model, source) if theirs else {}))


def find_lora(path) -> Path:
    """Returns the LoRA file of a path: the path itself, or the LoRA file in it if it is a folder.

    The file need not exist.

    Raises:
        ConfigError: the folder has several files, so that one has to be named.
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
    """Returns the layers with their common scale; if their scales differ, each B is multiplied by its layer's scale."""
    scales = {factors.scale for factors in layers.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for name, factors in layers.items():
        up = factors.up if factors.scale == common else factors.scale * factors.up
        tensors |= {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": up}
    return LoraWeights(tensors, common)


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the tensors of a file in float32, and its header."""
    if not path.is_file():
        raise ConfigError(f"no LoRA file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        # Pickles (.bin, .pt, .ckpt) are not even tried, because they could run code.
        raise ConfigError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    check_finite(tensors, repr(str(path)))
    return tensors, metadata


def check_finite(tensors: dict[str, torch.Tensor], source: str) -> None:
    """Checks that all tensors are finite.

    Args:
        tensors: the tensors by name.
        source: where the tensors are from; the error message begins with it.

    Raises:
        ConfigError: some of the tensors are not finite.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ConfigError(f"{source}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, such as {bad[0]!r}")
