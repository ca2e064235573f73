"""LoRA files of other tools, in whatever layout diffusers knows for the model's pipeline.

kohya's layout is read by kohya.py: for FLUX.1 diffusers takes the released width for granted, for Stable Diffusion 3 it
has no such reader, and the names are needed for writing anyway.
"""

import re

import torch

from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError

_FACTORS = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}


def read_foreign(raw: dict[str, torch.Tensor], model: Model, source: str) -> dict[str, torch.Tensor]:
    """Both factors of each layer, "<module>.lora_A.weight" and "<module>.lora_B.weight", whose
    scale is in the B where the file has an alpha.

    Args:
        raw: the tensors of a file.
        model: that it is for; its pipeline's `lora_state_dict` converts them.
        source: the file, for errors.

    Raises:
        ConfigError: diffusers does not know the layout, or does not convert all of it.
    """
    cls = model.pipeline_class()
    options = {"unet_config": model.denoiser.config} if model.denoiser_name == "unet" else {}
    try:
        answer = cls.lora_state_dict(dict(raw), **options)
    except Exception as error:  # its readers fail in many ways
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"{source}: diffusers cannot convert this layout for a {cls.__name__} ({reason})") from error
    converted, alphas = answer[:2] if isinstance(answer, tuple) else (answer, None)
    if alphas:  # of no layout but kohya's
        raise ConfigError(f"{source}: an alpha of its own for each layer is not supported in this layout")
    return {_canonical(name): tensor for name, tensor in converted.items()}


def _canonical(name: str) -> str:
    name = re.sub(r"^(unet|transformer)\.", "", name)
    ending = next((ending for ending in _FACTORS if name.endswith(ending)), "")
    return name.removesuffix(ending) + _FACTORS[ending] if ending else name
