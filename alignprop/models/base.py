"""The protocol through which the rest of the code uses a model family.

Latent shapes, VAE scale and shift, extra embeddings and packing never leave the file of the family.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # their names in diffusers pipelines
Conditioning = dict[str, torch.Tensor]
"""The conditioning of the denoiser: named tensors, each with the batch as its first dimension."""


def split_name(name: str) -> tuple[str, str]:
    """Splits a layer's name in a LoRA file into its text encoder ("" for the denoiser) and its name in that network."""
    part, _, inner = name.partition(".")
    return (part, inner) if part in ENCODERS else ("", name)


def select(cond: Conditioning, samples) -> Conditioning:
    """Returns the conditioning of some samples, which are given as a slice or as indices, int [b]."""
    return {name: tensor[samples] for name, tensor in cond.items()}


Phases = Callable[[str], AbstractContextManager]
"""`with phases("decode"): …` brings the modules of that phase to the device (memory/residency.py)."""


def encode(model: "Model", prompts: list[str], phases: Phases) -> Conditioning:
    """Returns the conditioning of B prompts; brings the text encoders to the device only if they are needed."""
    if model.knows(prompts):
        return model.encode_prompts(prompts)
    with phases("encode"):
        return model.encode_prompts(prompts)


class Model(Protocol):
    """One text-to-image model.

    Attributes:
        denoiser: the network that is trained. Everything else is frozen, except adapters of `lora_encoders` if the
            configuration asks for them.
        denoiser_name: the name of the denoiser in its pipeline.
        text_encoders: the networks that `encode_prompts` calls.
        decoder: the network that `decode` calls.
        device: where conditioning and latents are put. The code that moves the modules sets it.
        scheduler: the diffusers scheduler that the model came with.
        takes_guidance: whether `guidance_scale` changes anything.
        lora_targets: a LoRA adapts the layers with these name endings, unless the configuration names others.
        negatives: maps a prompt to a negative prompt of its own, for models with an unconditional branch.
        lora_encoders: the text encoders that a LoRA file of the family can hold, by their names in the pipeline.
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
    negatives: dict[str, str]

    def pipeline_class(self) -> type:
        """Returns the diffusers pipeline class that loads the files of `save_lora`."""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Returns the conditioning of B prompts, without graph.

        It is remembered, unless a text encoder has an adapter, because training may change the adapter.
        """

    def backward_prompts(self, prompts: list[str], gradients: Conditioning) -> None:
        """Adds ∂R/∂θ to the `.grad` of the trained parameters of the text encoders.

        Args:
            prompts: B prompts.
            gradients: ∂R/∂c, for any of the tensors of `encode_prompts(prompts)`.
        """

    def knows(self, prompts: list[str]) -> bool:
        """Says whether `encode_prompts` remembers all these prompts, so that it needs no text encoder."""

    def blank_conditioning(self, count: int) -> Conditioning:
        """Returns zeros in the shapes that `encode_prompts` returns for `count` prompts."""

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        """Returns the inputs of `predict`: [unconditional, conditional], or [conditional] without guidance."""

    def mixing_scale(self, guidance_scale: float) -> float:
        """Returns g in f = u + g·(c - u), the formula that mixes two branches."""

    def schedule(self, num_inference_steps: int) -> dict:
        """Returns the further arguments of the scheduler's `set_timesteps` (method/samplers.py)."""

    def of_size(self, size: tuple[int, int]) -> "Model":
        """Returns this model for pictures of (height, width) pixels; both have the same networks and conditioning."""

    def init_latents(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Draws x[0], float32 latents [B, ...]; sample b is drawn from the b-th generator."""

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        """Returns the denoiser's output, in the shape of `latents`.

        Args:
            branch: one of the branches, or several that are joined along the batch.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, H, W], float32 in [0, 1]; differentiable."""

    def save_lora(self, folder, tensors: dict[str, torch.Tensor], scale: float) -> None:
        """Writes an adapter in the format that its pipeline's `load_lora_weights(folder)` reads.

        Args:
            tensors: both factors of each layer, in the format of `LoraWeights`, with the names of lora/networks.py.
            scale: alpha / rank.
        """
