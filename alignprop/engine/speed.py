"""Speed: the memory layout of convolutions, compiled blocks, and a clock."""

import time
from collections.abc import Callable

import torch

from alignprop.models.base import Model
from alignprop.models.packed import is_packed
from alignprop.settings.errors import ConfigError


def use_channels_last(model: Model) -> None:
    """Puts the weights of convolutions, and so their activations, in NHWC order."""
    for module in (model.denoiser, model.decoder):
        module.to(memory_format=torch.channels_last)


def compile_blocks(denoiser: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles the denoiser's repeated blocks, each kind of block once.

    The denoiser's adapter and memory policy must be in place before.

    Raises:
        ConfigError: diffusers names no repeated blocks for this denoiser, or its weights are packed.
    """
    if not getattr(denoiser, "_repeated_blocks", None):
        raise ConfigError(f"compile = True: {type(denoiser).__name__} has no repeated blocks that diffusers compiles")
    if is_packed(denoiser):
        raise ConfigError(
            "compile = True: the denoiser is quantised; its unpacked weights would be kept for the gradient"
        )
    # A block is traced again for each of its widths and resolutions, with and without gradient, and for one and for
    # several samples. Under torch's default limit of 8 the last of these variants would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    denoiser.compile_repeated_blocks(backend=backend)


class Timed:
    """Calls `sample(generators, …)` and measures the time of its calls.

    Attributes:
        seconds_per_picture: the mean time of a picture, over all calls so far.
    """

    def __init__(self, sample: Callable[..., torch.Tensor], device: torch.device):
        self.sample, self.device, self.seconds, self.pictures = sample, device, 0.0, 0

    def __call__(self, generators, *args) -> torch.Tensor:
        start = time.perf_counter()
        latents = self.sample(generators, *args)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds, self.pictures = self.seconds + time.perf_counter() - start, self.pictures + len(generators)
        return latents

    @property
    def seconds_per_picture(self) -> float:
        return self.seconds / max(self.pictures, 1)
