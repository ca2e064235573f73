"""Z-Image: one stream of image and text tokens, a language model's hidden states as text, flow matching."""

import torch

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion, even_sigmas, resolution_shift

TOKENS = 512  # the default of the pipeline
RESOLUTION = 1024  # the default of the pipeline


class ZImage(LatentDiffusion):
    """The Model protocol (models/base.py) for Z-Image. Its conditioning is

    prompt_embeds: [B, 512, D], the second-to-last hidden states of Qwen3.
    padding: [B, 512], true at the positions after the last token of the prompt.

    and the same two for an empty prompt, as negative_…

    As for every other family, a `guidance_scale` of 1 means no guidance. It is the `guidance_scale` of this pipeline
    plus 1.
    """

    pipeline_name = "ZImagePipeline"

    def encode(self, prompts: list[str]) -> Conditioning:
        # The pipeline gets a copy of the list, because it writes its chat template into it.
        states = self.pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )[0]
        embeds = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, TOKENS - embeds.shape[1]))
        lengths = torch.tensor([len(tokens) for tokens in states], device=embeds.device)
        return {"prompt_embeds": embeds, "padding": torch.arange(TOKENS, device=embeds.device) >= lengths[:, None]}

    def reader(self) -> tuple:
        return self.chat_reader(TOKENS, enable_thinking=True)

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width = size or (RESOLUTION, RESOLUTION)
        return 2 * (height // (2 * self.vae_factor)), 2 * (width // (2 * self.vae_factor))

    def schedule(self, num_inference_steps: int) -> dict:
        _, height, width = self.latent_shape
        mu = resolution_shift(self.scheduler, height * width // 4)
        return {"mu": mu, "sigmas": even_sigmas(num_inference_steps)}

    def blank_conditioning(self, count: int) -> Conditioning:
        blank = {
            "prompt_embeds": self._zeros(count, TOKENS, self.text_encoders[0].config.hidden_size),
            "padding": torch.zeros(count, TOKENS, dtype=torch.bool, device=self.device),
        }
        return blank | {f"negative_{name}": tensor.clone() for name, tensor in blank.items()}

    def predict(self, latents, timestep, branch: Conditioning) -> torch.Tensor:
        prompt_embeds, padding = branch["prompt_embeds"], branch["padding"]
        # Memory is planned on the meta device, where the lengths of prompts are unknown, so all 512 tokens count.
        texts = (
            prompt_embeds.unbind() if padding.is_meta else [e[~p] for e, p in zip(prompt_embeds, padding, strict=True)]
        )
        outputs = self.denoiser(
            list(latents.to(prompt_embeds.dtype).unsqueeze(2).unbind()),
            (1000 - timestep.expand(len(latents))) / 1000,  # its time and its velocity have the other direction
            list(texts),
        ).sample
        return -torch.stack(outputs).squeeze(2)
