"""The code that the UNet families share: it gives every input of the UNet, or refuses a UNet with another input."""

import torch
from diffusers.models.embeddings import get_timestep_embedding

from alignprop.models.base import Conditioning
from alignprop.models.latent import LatentDiffusion
from alignprop.models.text import NEGATIVE
from alignprop.settings.errors import ConfigError


class UNetDiffusion(LatentDiffusion):
    """The part of the Model protocol (models/base.py) that gives a UNet's further inputs.

    Guidance is distilled into a UNet with `time_cond_proj_dim`, such as the UNet of a latent consistency model.
    For such a UNet `guidance_scale` is an input, and there is no second branch.

    Attributes:
        added: the `addition_embed_type` for which `predict` gives the added conditions.
    """

    added: str | None = None

    def __init__(self, pipeline, *args, **options):
        self.guides = pipeline.unet.config.time_cond_proj_dim is None
        super().__init__(pipeline, *args, **options)

    @classmethod
    def load(cls, name: str, **options):
        """Loads the model, as `LatentDiffusion.load` does.

        Raises:
            ConfigError: also for a related model that is not text-to-image, such as a model for inpainting.
        """
        model = super().load(name, **options)
        if reason := unknown_inputs(model.denoiser.config, model.decoder.config.latent_channels, cls.added):
            raise ConfigError(
                f"pretrained.model = {name!r} is not a text-to-image model for a {cls.pipeline_name}: its UNet {reason}"
            )
        return model

    def branches(self, cond: Conditioning, guidance_scale: float) -> list[Conditioning]:
        if self.guides:
            return super().branches(cond, guidance_scale)
        conditional = {name: tensor for name, tensor in cond.items() if not name.startswith(NEGATIVE)}
        embeds = cond["prompt_embeds"]
        guidance = torch.full((len(embeds),), 1000 * (guidance_scale - 1), device=embeds.device)
        width = self.denoiser.config.time_cond_proj_dim
        embedded = get_timestep_embedding(guidance, width, downscale_freq_shift=1)  # sines first, as in the pipelines
        return [{**conditional, "timestep_cond": embedded.to(embeds.dtype)}]

    def with_negative(self, blank: Conditioning) -> Conditioning:
        """Adds the conditioning of the unconditional branch, if there is one."""
        return blank | ({NEGATIVE + name: tensor.clone() for name, tensor in blank.items()} if self.guides else {})


def unknown_inputs(config, latent_channels: int, added: str | None) -> str:
    """Describes an input of a UNet that no family here gives; returns "" if there is no such input.

    Args:
        config: the UNet's configuration.
        latent_channels: the number of channels of the VAE's latents.
        added: the `addition_embed_type` for which the added conditions are given.
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
