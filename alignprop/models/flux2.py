"""FLUX.2 [klein]: a transformer over image tokens and a language model's text tokens, flow matching."""

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion, even_sigmas

TOKENS = 512  # the default of the pipeline
RESOLUTION = 1024  # the default of the pipeline
LAYERS = (9, 18, 27)  # the layers of the language model that give the hidden states of the prompt


class Flux2Klein(LatentDiffusion):
    """The Model protocol (models/base.py) for FLUX.2 [klein]. Its conditioning is

    prompt_embeds: [B, 512, 3 · D], the hidden states of three layers of Qwen3, side by side.

    and the same for an empty prompt, as negative_prompt_embeds. The distilled models know no guidance and have only
    the first.

    The latents are [B, 128, H/16, W/16]. Each is a square of 2 × 2 of the VAE's latents, normalised.
    """

    pipeline_name = "Flux2KleinPipeline"

    def __init__(self, pipeline, **options):
        self.guides = not pipeline.config.get("is_distilled", False)
        super().__init__(pipeline, **options)

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=TOKENS, text_encoder_out_layers=LAYERS
        )
        return {"prompt_embeds": embeds}

    def reader(self) -> tuple:
        return self.chat_reader(TOKENS, enable_thinking=False)

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width = size or (RESOLUTION, RESOLUTION)
        return height // (2 * self.vae_factor), width // (2 * self.vae_factor)

    def schedule(self, num_inference_steps: int) -> dict:
        mu = empirical_shift(self.latent_shape[1] * self.latent_shape[2], num_inference_steps)
        if self.scheduler.config.get("use_flow_sigmas"):
            return {"mu": mu}
        return {"mu": mu, "sigmas": even_sigmas(num_inference_steps)}

    def blank_conditioning(self, count: int) -> Conditioning:
        embeds = self._zeros(count, TOKENS, len(LAYERS) * self.text_encoders[0].config.hidden_size)
        return {"prompt_embeds": embeds} | ({"negative_prompt_embeds": embeds.clone()} if self.guides else {})

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        return super().branches(cond, guidance_scale if self.guides else 1)

    @property
    def takes_guidance(self) -> bool:
        return self.guides

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        batch, _, height, width = latents.shape
        tokens = self.denoiser(
            hidden_states=latents.to(prompt_embeds.dtype).flatten(2).transpose(1, 2),
            encoder_hidden_states=prompt_embeds,
            timestep=timestep.expand(batch) / 1000,  # the transformer multiplies by 1000 again
            img_ids=positions(height, width, 1, latents.device).expand(batch, -1, -1),
            txt_ids=positions(1, 1, prompt_embeds.shape[1], latents.device).expand(batch, -1, -1),
            guidance=None,
        ).sample
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        statistics, config = self.decoder.bn, self.decoder.config
        std = (statistics.running_var + config.batch_norm_eps).sqrt()
        latents = latents * std.view(1, -1, 1, 1) + statistics.running_mean.view(1, -1, 1, 1)
        return self.pictures(torch.nn.functional.pixel_shuffle(latents.to(self.decoder.dtype), 2))


def positions(height: int, width: int, tokens: int, device) -> torch.Tensor:
    """Returns the positions (0, row, column, index) of n tokens, [n, 4].

    For picture tokens `tokens` is 1. For text tokens `height` and `width` are 1.
    """
    grid = [torch.arange(n, device=device) for n in (1, height, width, tokens)]
    return torch.cartesian_prod(*grid)


def empirical_shift(tokens: int, num_steps: int) -> float:
    """Returns mu, the shift of the noise levels, by the formula of the pipeline.

    At 10 and at 200 steps mu is linear in the number of tokens. For another number of steps it is on the straight line
    through these two values. Above 4300 tokens the value at 200 steps is used for any number of steps.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)
