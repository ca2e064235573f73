"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, epsilon- or v-prediction."""

from typing import ClassVar

import torch

from alignprop.models.base import Conditioning
from alignprop.models.unet import UNetDiffusion


class StableDiffusion(UNetDiffusion):
    """The Model protocol (models/base.py) for Stable Diffusion 1.x and 2.x. Its conditioning is

    prompt_embeds, negative_prompt_embeds: [B, 77, D], the hidden states of the text encoder.
    """

    pipeline_name = "StableDiffusionPipeline"
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    adaptable = ("text_encoder",)
    load_options: ClassVar[dict] = {"requires_safety_checker": False}

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def blank_conditioning(self, count: int) -> Conditioning:
        config = self.text_encoders[0].config
        embeds = self._zeros(count, config.max_position_embeddings, config.hidden_size)
        return self.with_negative({"prompt_embeds": embeds})

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        guidance = branch.get("timestep_cond")
        return self.denoiser(latents.to(prompt_embeds.dtype), timestep, prompt_embeds, timestep_cond=guidance).sample
