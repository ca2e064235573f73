"""How much the adapter of a denoiser or a text encoder counts: as it was trained, not at all, or anything else."""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from alignprop.lora.factors import ADAPTER


def scale_lora(network, scale: float) -> None:
    """From now on the adapter's weight change counts `scale` times: 1 is the adapter, 0 the base, both to the bit."""
    for layer in _adapted_layers(network):
        layer.set_scale(ADAPTER, scale)


@contextmanager
def without_lora(*networks):
    """Within it they are the base model's. What is trained stays so: peft's own switch would freeze it."""
    layers = [layer for network in networks for layer in _adapted_layers(network)]
    before = [layer.scaling[ADAPTER] for layer in layers]
    for network in networks:
        scale_lora(network, 0.0)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scaling


def linear_schedule(timesteps: torch.Tensor, scale: float) -> Callable[[torch.Tensor], float]:
    """How much an adapter counts at a timestep: linearly from 0 at the chain's first step to `scale` at its last.

    Early steps lay a picture out, which the base model is left to do. Annealed importance guidance (Jena et al. 2024,
    arXiv 2409.06493) blends the outputs of the two models so; blending weights costs no further network call.

    Args:
        timesteps: of the chain, [N].
    """
    scales = torch.linspace(scale, 0, len(timesteps), dtype=torch.float64).flip(0)  # a chain of one step has the last
    scale_at = dict(zip(timesteps.tolist(), scales.tolist(), strict=True))
    return lambda timestep: scale_at[timestep.item()]


def _adapted_layers(network) -> list:
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]
