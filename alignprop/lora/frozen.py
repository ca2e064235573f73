"""LoRAs that stay on, frozen, beneath the trained one, such as LCM-LoRA: they are merged into the model's weights."""

import math
from pathlib import Path

import torch

from alignprop.lora.adapters import split
from alignprop.lora.fetch import fetch_lora, is_hub_name
from alignprop.lora.files import read_lora
from alignprop.lora.networks import adaptable_networks
from alignprop.models.base import Model
from alignprop.models.packed import Packed
from alignprop.settings.errors import ConfigError

FIELD = "pretrained.loras"


def parse_loras(text: str) -> list[tuple[str, float]]:
    """ "user/lcm, style.safetensors@0.6" -> [("user/lcm", 1.0), ("style.safetensors", 0.6)].

    Raises:
        ConfigError: a strength is not a finite number, or is 0, or a name is missing.
    """
    loras = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, at, number = part.rpartition("@")
        try:
            name, strength = (name.strip(), float(number)) if at else (part, 1.0)
        except ValueError:
            name, strength = "", 0.0
        if not (name and strength and math.isfinite(strength)):
            raise ConfigError(
                f"{FIELD} = {text!r} must be NAME or NAME@STRENGTH, separated by commas; a strength is not 0"
            )
        loras.append((name, strength))
    return loras


def find_loras(loras: list[tuple[str, float]]) -> list[tuple[Path, float]]:
    """Returns the path of each LoRA, with its strength. A LoRA that only the hub has is downloaded.

    Raises:
        ConfigError: a LoRA is neither here nor on the hub.
    """
    found = []
    for name, strength in loras:
        path = Path(name).expanduser()
        if not path.exists():
            if not is_hub_name(name):
                raise ConfigError(f"{FIELD}: {name!r} is no file, no folder and no name on the hub")
            path = fetch_lora(name, FIELD)
        found.append((path, strength))
    return found


@torch.no_grad()
def merge_frozen(model: Model, loras: list[tuple[Path, float]]) -> None:
    """Adds strength · ΔW of each LoRA to the weights of the model, in float32, and rounds to their precision.

    Args:
        model: the model, without an adapter, before it has encoded a prompt.
        loras: the file or folder of each LoRA, and its strength.

    Raises:
        ConfigError: a LoRA cannot be read, or is for another model, or the model's files are quantised.
    """
    networks = adaptable_networks(model)
    for path, strength in loras:
        try:
            lora_weights = read_lora(path, model)
        except ConfigError as error:
            raise ConfigError(f"{FIELD}: {error}") from error
        for part, lora in split(model, lora_weights).items():
            for module in lora.modules:
                layer = networks[part].get_submodule(module)
                if isinstance(layer, Packed):
                    raise ConfigError(f"{FIELD}: {str(path)!r} cannot be merged into weights whose files are quantised")
                weight = layer.weight
                weight.copy_(weight.float() + strength * lora.delta(module).to(weight.device))
