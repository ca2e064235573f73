"""Reads the scale of each layer of a LoRA, alpha / rank, from peft's settings.

diffusers writes these settings into the header of a file, and peft into `adapter_config.json` next to it.
"""

import json
import math
import re
from pathlib import Path

from alignprop.lora.layouts import Factors
from alignprop.settings.errors import ConfigError

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_HEADER = "lora_adapter_metadata"


def stated_scales(layers: dict[str, Factors], metadata: dict[str, str], path: Path) -> dict[str, float]:
    """Returns the scale alpha / rank of every layer: from its own tensors, or else from the settings, or else 1.

    Args:
        layers: the layers of a file, by their names in it.
        metadata: the file's header.
        path: the file.

    Raises:
        ConfigError: the settings are damaged, or belong to an adapter that is not a LoRA.
    """
    settings = _read_settings(metadata, path)
    try:
        stated = {name: _scale(name, len(factors.down), settings) for name, factors in layers.items()}
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise ConfigError(f"{str(path)!r}: the {_where(metadata, path)} is damaged") from error
    return {name: stated[name] if factors.scale is None else factors.scale for name, factors in layers.items()}


def _where(metadata: dict[str, str], path: Path) -> str:
    return f"{_HEADER} in its header" if _HEADER in metadata else f"{PEFT_CONFIG} next to it"


def _read_settings(metadata: dict[str, str], path: Path) -> dict:
    """Reads peft's settings; returns {} if the file is not one that has them."""
    beside = path.with_name(PEFT_CONFIG)
    if _HEADER not in metadata and path.name != PEFT_FILE:
        return {}
    try:
        settings = json.loads(metadata[_HEADER] if _HEADER in metadata else beside.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{str(path)!r}: cannot read {PEFT_CONFIG} next to it, which contains alpha") from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: the {_where(metadata, path)} is damaged") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{str(path)!r}: the {_where(metadata, path)} is damaged")
    if (kind := settings.get("peft_type") or "LORA") != "LORA":
        raise ConfigError(f"{str(path)!r} is a {kind} adapter by its {PEFT_CONFIG}; only LoRAs can be read")
    return settings


def _scale(name: str, rank: int, settings: dict) -> float:
    """Returns alpha / rank of a layer, by peft's rules for patterns of names.

    In diffusers' header the name of each setting begins with the network, as in "unet.r".
    """
    networks = [key.removesuffix("r") for key in settings if key == "r" or key.endswith(".r")]
    if not networks:
        return 1.0
    network = next(network for network in sorted(networks, reverse=True) if name.startswith(network))
    layer = name.removeprefix(network).removeprefix("base_model.model.")
    alphas = settings.get(f"{network}alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer)]
    alpha = fitting[0] if fitting else settings[f"{network}lora_alpha"]
    return alpha / (math.sqrt(rank) if settings.get(f"{network}use_rslora") else rank)
