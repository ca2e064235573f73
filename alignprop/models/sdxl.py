"""Stable Diffusion XL: one UNet, two CLIP text encoders, picture sizes as a condition, epsilon- or v-prediction."""

import torch

from alignprop.models.base import Conditioning
from alignprop.models.unet import UNetDiffusion


class StableDiffusionXL(UNetDiffusion):
    """The Model protocol (models/base.py) for Stable Diffusion XL. Its conditioning is

    prompt_embeds: [B, 77, 2048], the second-to-last hidden states of both text encoders, side by side.
    pooled_prompt_embeds: [B, 1280], the pooled output of the second text encoder.

    and, if the model has two branches of guidance, negative_prompt_embeds and negative_pooled_prompt_embeds. These are
    zeros or the embeddings of an empty prompt, as the pipeline's configuration says.

    The released VAE overflows in float16. As its `force_upcast` asks, it stays in float32 then. `pretrained.vae` can
    name a VAE that does not overflow.
    """

    pipeline_name = "StableDiffusionXLPipeline"
    unused = ("feature_extractor", "image_encoder")
    adaptable = ("text_encoder", "text_encoder_2")
    added = "text_time"

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def unconditional(self, cond: Conditioning, negative_prompt: str) -> Conditioning:
        zeros = not negative_prompt and self.pipeline.config.get("force_zeros_for_empty_prompt", True)
        return {name: torch.zeros_like(tensor) if zeros else tensor for name, tensor in cond.items()}

    def blank_conditioning(self, count: int) -> Conditioning:
        first, second = (encoder.config for encoder in self.text_encoders)
        embeds = (count, first.max_position_embeddings, first.hidden_size + second.hidden_size)
        blank = {
            "prompt_embeds": self._zeros(*embeds),
            "pooled_prompt_embeds": self._zeros(count, second.projection_dim),
        }
        return self.with_negative(blank)

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        pooled = branch["pooled_prompt_embeds"]
        added = {"text_embeds": pooled, "time_ids": self._time_ids(latents, pooled)}
        given = {"added_cond_kwargs": added, "timestep_cond": branch.get("timestep_cond")}
        return self.denoiser(latents.to(prompt_embeds.dtype), timestep, prompt_embeds, **given).sample

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.decoder.config
        if not config.get("latents_mean"):
            return super().decode(latents)
        # Some models, such as Playground v2.5, normalise their latents by a mean and a standard deviation.
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return self.pictures((latents * std / config.scaling_factor + mean).to(self.decoder.dtype))

    def _time_ids(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Returns [B, 6] for pictures that were neither scaled nor cropped, in pixels.

        These are the original size, the corner of the crop and the target size.
        """
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        return like.new_tensor([[height, width, 0, 0, height, width]]).repeat(len(latents), 1)
