"""What the families around a UNet share: each input of the network is given or refused."""

import torch
from diffusers.models.embeddings import get_timestep_embedding

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion
from alignprop.models.text import NEGATIVE
from alignprop.settings.errors import ConfigError


class UNetDiffusion(LatentDiffusion):
    """The part of the Model protocol (models/base.py) that is about a UNet's further inputs.

    A UNet with `time_cond_proj_dim`, such as a latent consistency model's, has guidance distilled into it:
    `guidance_scale` is an input, and there is no second branch.

    Attributes:
        added: the `addition_embed_type` of the UNets whose added conditions `predict` gives.
    """

    added: str | None = None

    def __init__(self, pipeline, *args, **options):
        self.guides = pipeline.unet.config.time_cond_proj_dim is None
        super().__init__(pipeline, *args, **options)

    @classmethod
    def load(cls, name: str, **options):
        """
        Raises:
            ConfigError: also for a relative that is no text-to-image model, such as one for inpainting.
        """
        model = super().load(name, **options)
        if reason := unknown_inputs(model.denoiser.config, model.decoder.config.latent_channels, cls.added):
            raise ConfigError(
                f"pretrained.model = {name!r} is not a text-to-image model that a {cls.pipeline_name} makes: its UNet "
                f"{reason}"
            )
        return model

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        if self.guides:
            return super().branches(cond, guidance_scale)
        conditional = {name: tensor for name, tensor in cond.items() if not name.startswith(NEGATIVE)}
        embeds = cond["prompt_embeds"]
        guidance = torch.full((len(embeds),), 1000 * (guidance_scale - 1), device=embeds.device)
        width = self.denoiser.config.time_cond_proj_dim
        embedded = get_timestep_embedding(guidance, width, downscale_freq_shift=1)  # sines first, as the pipelines have
        return [{**conditional, "timestep_cond": embedded.to(embeds.dtype)}]

    def with_negative(self, blank: Conditioning) -> Conditioning:
        """The conditioning of both branches of guidance, where there are two."""
        return blank | ({NEGATIVE + name: tensor.clone() for name, tensor in blank.items()} if self.guides else {})


def unknown_inputs(config, latent_channels: int, added: str | None) -> str:
    """Which input of a UNet nobody here would give; "" where there is none.

    Args:
        config: the UNet's configuration.
        latent_channels: of the VAE.
        added: the `addition_embed_type` whose conditions are given.
    """
    if config.in_channels != latent_channels or config.out_channels != latent_channels:
        return (
            f"takes {config.in_channels} channels and returns {config.out_channels}, and its VAE has {latent_channels}"
        )
    if config.addition_embed_type != added:
        return f"has the added conditions {config.addition_embed_type!r}, not {added!r}"
    for field, known in (("class_embed_type", None), ("num_class_embeds", None), ("encoder_hid_dim_type", "text_proj")):
        if config.get(field) not in (None, known):
            return f"has {field} = {config[field]!r}, an input that is not a prompt"
    return ""
