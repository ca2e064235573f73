"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, epsilon- or v-prediction."""

from typing import ClassVar

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion
from alignprop.settings.errors import ConfigError


class StableDiffusion(LatentDiffusion):
    """The Model protocol (models/base.py), its conditioning being

    prompt_embeds, negative_prompt_embeds: [B, 77, D], the encoder's hidden states.
    """

    pipeline_name = "StableDiffusionPipeline"
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    adaptable = ("text_encoder",)
    load_options: ClassVar[dict] = {"requires_safety_checker": False}

    @classmethod
    def load(cls, name: str, **options) -> "StableDiffusion":
        """
        Raises:
            ConfigError: also for a relative that is no text-to-image model, such as one for inpainting.
        """
        model = super().load(name, **options)
        unet, vae = model.denoiser.config, model.decoder.config
        if unet.addition_embed_type or unet.in_channels != vae.latent_channels:
            raise ConfigError(
                f"pretrained.model = {name!r} is not a text-to-image model of Stable Diffusion 1.x or 2.x "
                f"(its UNet takes {unet.in_channels} channels and {unet.addition_embed_type or 'no'} added conditions)"
            )
        return model

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds}

    def blank_conditioning(self, count: int) -> Conditioning:
        config = self.text_encoders[0].config
        embeds = self._zeros(count, config.max_position_embeddings, config.hidden_size)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": embeds.clone()}

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        return self.denoiser(latents.to(prompt_embeds.dtype), timestep, prompt_embeds).sample
