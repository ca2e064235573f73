"""FLUX.2 [klein]: a transformer over image tokens and a language model's text tokens, flow matching."""

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion, even_sigmas

TOKENS = 512  # the pipeline's own default
RESOLUTION = 1024  # likewise
LAYERS = (9, 18, 27)  # of the language model, whose hidden states are put side by side


class Flux2Klein(LatentDiffusion):
    """The Model protocol (models/base.py), its conditioning being

    prompt_embeds: [B, 512, 3 · D], hidden states of three layers of Qwen3.

    and the same once more as negative_…, but for the distilled models, which know no guidance.

    Its latents are squares of 2 × 2 of the VAE's, normalised: [B, 128, H/16, W/16].
    """

    pipeline_name = "Flux2KleinPipeline"

    def __init__(self, pipeline, resolution: int | None = None, true_cfg_scale: float = 1.0):
        self.guides = not pipeline.config.get("is_distilled", False)
        super().__init__(pipeline, resolution, true_cfg_scale)

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.device, max_sequence_length=TOKENS, text_encoder_out_layers=LAYERS
        )
        return {"prompt_embeds": embeds}

    def reader(self) -> tuple:
        return self.chat_reader(TOKENS, enable_thinking=False)

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def latent_size(self, resolution: int | None) -> tuple[int, int]:
        return ((resolution or RESOLUTION) // (2 * self.vae_factor),) * 2

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
            timestep=timestep.expand(batch) / 1000,  # it multiplies by 1000 again
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
    """(0, row, column, index) of picture tokens, where `tokens` is 1, or of text tokens, [n, 4]."""
    grid = [torch.arange(n, device=device) for n in (1, height, width, tokens)]
    return torch.cartesian_prod(*grid)


def empirical_shift(tokens: int, num_steps: int) -> float:
    """mu, the shift of the noise levels, as the pipeline has it: two straight lines in the number of tokens, for 10 and
    for 200 steps, and one between them in the number of steps; many tokens have the latter's whatever the steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)
