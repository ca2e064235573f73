"""Scales the adapter of a denoiser or a text encoder: as it was trained, to zero, or by any other factor."""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from alignprop.lora.factors import ADAPTER


def scale_lora(network, scale: float) -> None:
    """Multiplies the adapter's weight change by `scale` from now on; 1 is exactly the adapter, 0 exactly the base."""
    for layer in _adapted_layers(network):
        layer.set_scale(ADAPTER, scale)


@contextmanager
def without_lora(*networks):
    """A context in which the networks are those of the base model.

    Trained parameters stay trainable, which is why it does not use peft's own switch: that would freeze them.
    """
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
    """Returns the adapter's scale as a function of the timestep: linear from 0 at the first step to `scale` at the end.

    The early steps decide a picture's layout, and this leaves them to the base model. Annealed importance guidance
    (Jena et al. 2024, arXiv 2409.06493) blends the outputs of the two models in this way. Blending weights instead
    needs no further network call.

    Args:
        timesteps: the timesteps of the chain, [N].
        scale: the scale at the last step.
    """
    # The line starts at the last step, so that a chain of one step has the scale of the last step.
    scales = torch.linspace(scale, 0, len(timesteps), dtype=torch.float64).flip(0)
    scale_at = dict(zip(timesteps.tolist(), scales.tolist(), strict=True))
    return lambda timestep: scale_at[timestep.item()]


def _adapted_layers(network) -> list:
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]
