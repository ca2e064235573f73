"""FLUX.1: a transformer over packed image tokens and T5's text tokens, flow matching, distilled guidance."""

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion, even_sigmas, resolution_shift

T5_TOKENS = 512  # the default of the pipeline
RESOLUTION = 1024  # the default of the pipeline


class Flux(LatentDiffusion):
    """The Model protocol (models/base.py) for FLUX.1. Its conditioning is

    prompt_embeds: [B, 512, 4096], the hidden states of T5.
    pooled_prompt_embeds: [B, 768], the pooled output of CLIP.

    Guidance is distilled into the network, so `guidance_scale` is an input and there is no second branch.
    FLUX.1-schnell does not even have that input. A `true_cfg_scale` other than 1 adds guidance by an empty prompt. The
    conditioning then also has the same two tensors for the empty prompt, as negative_…
    """

    pipeline_name = "FluxPipeline"
    unused = ("image_encoder", "feature_extractor")
    adaptable = ("text_encoder",)

    def __init__(self, pipeline, true_cfg_scale: float = 1.0, **options):
        self.true_cfg_scale, self.guides = true_cfg_scale, true_cfg_scale != 1
        super().__init__(pipeline, **options)

    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=T5_TOKENS
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def reader(self) -> tuple:
        return self.pipeline.tokenizer_2, T5_TOKENS

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        # The transformer takes any number of tokens. The VAE's configuration may name the size used in training.
        height, width = size or (self.decoder.config.get("sample_size") or RESOLUTION,) * 2
        return 2 * (height // (2 * self.vae_factor)), 2 * (width // (2 * self.vae_factor))

    def schedule(self, num_inference_steps: int) -> dict:
        _, height, width = self.latent_shape
        mu = resolution_shift(self.scheduler, height * width // 4)
        if self.scheduler.config.get("use_flow_sigmas"):
            return {"mu": mu}
        return {"mu": mu, "sigmas": even_sigmas(num_inference_steps)}

    def blank_conditioning(self, count: int) -> Conditioning:
        clip, t5 = (encoder.config for encoder in self.text_encoders)
        blank = {
            "prompt_embeds": self._zeros(count, T5_TOKENS, t5.d_model),
            "pooled_prompt_embeds": self._zeros(count, clip.hidden_size),
        }
        return blank | ({f"negative_{name}": t.clone() for name, t in blank.items()} if self.guides else {})

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        branches = super().branches(cond, self.true_cfg_scale)
        if not self.denoiser.config.guidance_embeds:
            return branches
        embeds = cond["prompt_embeds"]
        guidance = torch.full((len(embeds),), guidance_scale, dtype=torch.float32, device=embeds.device)
        return [{**branch, "guidance": guidance} for branch in branches]

    @property
    def takes_guidance(self) -> bool:
        return self.denoiser.config.guidance_embeds

    def mixing_scale(self, guidance_scale: float) -> float:
        return self.true_cfg_scale

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds = branch["prompt_embeds"]
        height, width = latents.shape[-2:]
        tokens = self.denoiser(
            hidden_states=pack(latents.to(prompt_embeds.dtype)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=branch["pooled_prompt_embeds"],
            timestep=timestep.expand(len(latents)) / 1000,  # the transformer multiplies by 1000 again
            img_ids=image_ids(height // 2, width // 2, prompt_embeds),
            txt_ids=prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),
            guidance=branch.get("guidance"),
        ).sample
        return unpack(tokens, height, width)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Turns latents [B, C, H, W] into tokens [B, H/2 · W/2, 4C], one for each square of 2 × 2, row by row."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Turns tokens into latents of that height and width; the inverse of `pack`."""
    batch, _, channels = tokens.shape
    squares = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the positions (0, row, column) of image tokens, [rows · columns, 3], with dtype and device of `like`."""
    options = {"dtype": like.dtype, "device": like.device}
    zero, row, column = torch.meshgrid(
        torch.zeros(1, **options), torch.arange(rows, **options), torch.arange(columns, **options), indexing="ij"
    )
    return torch.stack([zero, row, column], dim=-1).flatten(0, -2)
