"""Puts the frozen networks of a run into the formats that its configuration names."""

import torch
from ml_collections import ConfigDict
from torch import nn

from alignprop.evaluation.judges import Judges
from alignprop.models.base import Model
from alignprop.models.formats import FORMATS, check_packages, find_format
from alignprop.models.packed import pack, packable
from alignprop.models.products import multiply_in_8_bits
from alignprop.settings.errors import ConfigError

DENOISER, ENCODERS, REWARDS = "pretrained.quantize", "pretrained.quantize_text_encoders", "quantize_rewards"

OLDEST = {"int8": (7, 5), "fp8": (8, 9)}  # the compute capability from which a GPU multiplies in a format


def check_formats(config: ConfigDict) -> None:
    """Checks what the formats of a configuration need, before a model is loaded.

    Raises:
        ConfigError: the package of a format is not installed.
    """
    for field, name in _named(config).items():
        check_packages(name, field)


def quantize(model: Model, judges: Judges, config: ConfigDict, device: torch.device | None = None) -> None:
    """Packs the weights of the denoiser, the text encoders and the rewards, as the configuration says, in place.

    Layers that are narrow or of an unusual kind keep their weights (packed.py), and so does the VAE, which is small and
    whose errors are seen in every picture.

    Args:
        model: a loaded model without an adapter, or a skeleton.
        judges: the rewards.
        config: the resolved configuration.
        device: where the packed weights are computed. None is where the weights are.

    Raises:
        ConfigError: a network has no layer that can be packed, or the GPU cannot multiply in the format.
    """
    rewards = [judge for phase in judges.phases.values() for judge in phase if judge is not None]
    networks = {DENOISER: [model.denoiser], ENCODERS: model.text_encoders, REWARDS: rewards}
    for field, name in _named(config).items():
        if name in FORMATS:
            _quantize(networks[field], name, field, device)
    if config.pretrained.quantize_products and config.pretrained.quantize in OLDEST:
        _check_gpu(config.pretrained.quantize, device)
        multiply_in_8_bits(model.denoiser.modules())


def _named(config: ConfigDict) -> dict[str, str]:
    source = config.pretrained
    return {DENOISER: source.quantize, ENCODERS: source.quantize_text_encoders, REWARDS: config.quantize_rewards}


def _quantize(networks: list[nn.Module], name: str, field: str, device: torch.device | None) -> None:
    layers = {id(layer): layer for network in networks for layer in packable(network)}  # networks may share layers
    if not layers:
        raise ConfigError(f"{field} = {name!r} has nothing to pack: there is no wide linear layer or convolution")
    pack(layers.values(), find_format(name, field), device)


def _check_gpu(name: str, device: torch.device | None) -> None:
    if device and torch.version.cuda and torch.cuda.get_device_capability(device) < OLDEST[name]:
        found, oldest = (".".join(map(str, c)) for c in (torch.cuda.get_device_capability(device), OLDEST[name]))
        raise ConfigError(
            f"pretrained.quantize_products = True with pretrained.quantize = {name!r} needs a GPU of compute "
            f"capability {oldest}; this one has {found}"
        )
