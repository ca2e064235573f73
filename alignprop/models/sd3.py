"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens, two CLIPs and a T5 for text, flow matching."""

from typing import ClassVar

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion, resolution_shift

T5_TOKENS = 256  # the default of the pipeline
CLIP_TOKENS = 77


class StableDiffusion3(LatentDiffusion):
    """The Model protocol (models/base.py) for Stable Diffusion 3 and 3.5. Its conditioning is

    prompt_embeds: [B, 77 + 256, 4096], the tokens of both CLIPs, padded to the width of T5, and then the tokens of T5.
    pooled_prompt_embeds: [B, 2048], the pooled outputs of both CLIPs, side by side.

    and the same two for an empty prompt, as negative_… If T5, which has 9 GB, is left out, zeros replace its tokens.
    """

    pipeline_name = "StableDiffusion3Pipeline"
    unused = ("image_encoder", "feature_extractor")
    adaptable = ("text_encoder", "text_encoder_2")
    optional: ClassVar[dict] = {"t5": ("text_encoder_3", "tokenizer_3")}

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def reader(self) -> tuple:
        if len(self.text_encoders) == 3:
            return self.pipeline.tokenizer_3, T5_TOKENS
        return self.pipeline.tokenizer, CLIP_TOKENS

    def schedule(self, num_inference_steps: int) -> dict:
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = self.denoiser.config.patch_size
        tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
        return {"mu": resolution_shift(self.scheduler, tokens, max_shift=1.16)}

    def blank_conditioning(self, count: int) -> Conditioning:
        first, second = (encoder.config for encoder in self.text_encoders[:2])
        tokens = first.max_position_embeddings + T5_TOKENS
        blank = {
            "prompt_embeds": self._zeros(count, tokens, self.denoiser.config.joint_attention_dim),
            "pooled_prompt_embeds": self._zeros(count, first.projection_dim + second.projection_dim),
        }
        return blank | {f"negative_{name}": tensor.clone() for name, tensor in blank.items()}

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        return self.denoiser(
            hidden_states=latents.to(prompt_embeds.dtype),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=branch["pooled_prompt_embeds"],
            timestep=timestep.expand(len(latents)),
        ).sample
