"""What makes the same computation faster: the layout of convolutions, and compiled blocks."""

import torch

from alignprop.models.base import Model
from alignprop.settings.errors import ConfigError


def use_channels_last(model: Model) -> None:
    """Keeps the weights of convolutions, and with them their activations, in NHWC order."""
    for module in (model.denoiser, model.decoder):
        module.to(memory_format=torch.channels_last)


def compile_blocks(denoiser: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles the denoiser's repeated blocks, each kind of block once; after its adapter and policy are in place.

    Raises:
        ConfigError: diffusers names no repeated blocks for this denoiser.
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        raise ConfigError(f"compile = True: {type(denoiser).__name__} has no repeated blocks that diffusers compiles")
    # A block is traced anew for each of its widths and resolutions, with and without gradient, and for one and for
    # several samples; with torch's default of 8 the last of these would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    denoiser.compile_repeated_blocks(backend=backend)
