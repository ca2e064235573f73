"""What the rest of the code may know of a model family.

Latent shapes, VAE scale and shift, extra embeddings and packing never leave the family's own file.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # as diffusers pipelines call them
Conditioning = dict[str, torch.Tensor]
"""What the denoiser is conditioned on: named tensors, each with the batch as its first dimension."""


def split_name(name: str) -> tuple[str, str]:
    """Splits a layer's name in a LoRA file into its text encoder ("": the denoiser) and its name there."""
    part, _, inner = name.partition(".")
    return (part, inner) if part in ENCODERS else ("", name)


def select(cond: Conditioning, samples) -> Conditioning:
    """The conditioning of some samples: a slice, or int [b]."""
    return {name: tensor[samples] for name, tensor in cond.items()}


Phases = Callable[[str], AbstractContextManager]
"""`with phases("decode"): …` has the modules of that phase where they compute (memory/residency.py)."""


def encode(model: "Model", prompts: list[str], phases: Phases) -> Conditioning:
    """The conditioning of B prompts; the text encoders are brought to the device only where they are needed."""
    if model.knows(prompts):
        return model.encode_prompts(prompts)
    with phases("encode"):
        return model.encode_prompts(prompts)


class Model(Protocol):
    """One text-to-image model.

    Attributes:
        denoiser: the network that is trained; all else is frozen, but for adapters of `lora_encoders` where asked for.
        denoiser_name: what its pipeline calls it.
        text_encoders: what `encode_prompts` calls.
        decoder: what `decode` calls.
        device: where conditioning and latents are put; whoever moves the modules sets it.
        scheduler: the diffusers scheduler that the model came with.
        takes_guidance: whether `guidance_scale` changes anything.
        lora_targets: endings of the names of the layers that a LoRA adapts, unless the configuration names others.
        lora_encoders: the text encoders that a LoRA file of the family has a place for, by their names in the pipeline.
    """

    denoiser: torch.nn.Module
    denoiser_name: str
    text_encoders: list[torch.nn.Module]
    decoder: torch.nn.Module
    device: torch.device
    scheduler: Any
    takes_guidance: bool
    lora_targets: tuple[str, ...]
    lora_encoders: dict[str, torch.nn.Module]

    def pipeline_class(self) -> type:
        """The diffusers pipeline that loads what `save_lora` writes."""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of B prompts, without graph; remembered, unless a text encoder has an adapter: it may change."""

    def backward_prompts(self, prompts: list[str], gradients: Conditioning) -> None:
        """Adds ∂R/∂θ to the `.grad` of what is trained of the text encoders.

        Args:
            gradients: ∂R/∂c, of any of the tensors of `encode_prompts(prompts)`.
        """

    def knows(self, prompts: list[str]) -> bool:
        """Whether `encode_prompts` remembers all of them, and needs no text encoder."""

    def blank_conditioning(self, count: int) -> Conditioning:
        """Zeros in the shapes of `encode_prompts`' result for `count` prompts."""

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        """What `predict` is called with: [unconditional, conditional], or [conditional] where there is no guidance."""

    def mixing_scale(self, guidance_scale: float) -> float:
        """g in f = u + g·(c - u), where there are two branches."""

    def schedule(self, num_inference_steps: int) -> dict:
        """What the scheduler's `set_timesteps` is told besides the number of steps (method/samplers.py)."""

    def init_latents(self, generators: list[torch.Generator]) -> torch.Tensor:
        """x[0]: float32 latents [B, ...], sample b drawn from the b-th generator."""

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        """The denoiser's output under one of the branches, or several joined along the batch, like `latents`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W], float32 in [0, 1]; differentiable."""

    def save_lora(self, folder, tensors: dict[str, torch.Tensor], scale: float) -> None:
        """Writes an adapter so that `load_lora_weights(folder)` of its pipeline reads it.

        Args:
            tensors: both factors of each layer, as `LoraWeights` has them, under the names of lora/networks.py.
            scale: alpha / rank.
        """
