"""The code that all families share: it freezes modules, draws noise, decodes with a VAE and saves a LoRA."""

from copy import copy
from typing import ClassVar

import torch

from alignprop.models.base import ENCODERS, split_name
from alignprop.models.loading import load_pipeline
from alignprop.models.text import TextConditioned
from alignprop.settings.errors import ConfigError
from alignprop.settings.sizes import picture_sizes, size_name


class LatentDiffusion(TextConditioned):
    """The part of the Model protocol (models/base.py) that is the same for all families, over a diffusers pipeline.

    Args:
        pipeline: a loaded pipeline, or any object with the same parts (models/skeleton.py). Its modules are frozen
            here, and the encoder of the VAE is dropped.
        resolution: the size of the pictures in pixels, a side or "WIDTHxHEIGHT". None is the size that the model was
            trained for. Of several sizes with commas it is the one with the most pixels; the others are only checked.
        true_cfg_scale: strength of guidance by an empty prompt, for models that use `guidance_scale` for something
            else.
        negative_prompt: the prompt of the unconditional branch.

    Raises:
        ConfigError: the family has no pictures of that size, or no such guidance.

    Attributes:
        pipeline_name: the name of the diffusers pipeline class.
        unused: the parts of the pipeline that training does not need; they are not even loaded.
        optional: the components that a user may leave out, each with the parts of the pipeline that form it.
        load_options: further arguments of the pipeline's `from_pretrained`.
        lora_targets: a LoRA adapts the layers with these name endings if the configuration names none.
        adaptable: the text encoders that the pipeline's LoRA files can hold.
    """

    pipeline_name = ""
    unused: tuple[str, ...] = ()
    optional: ClassVar[dict[str, tuple[str, ...]]] = {}
    load_options: ClassVar[dict] = {}
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    adaptable: tuple[str, ...] = ()

    def __init__(
        self, pipeline, resolution: int | str | None = None, true_cfg_scale: float = 1.0, negative_prompt: str = ""
    ):
        if true_cfg_scale != 1:
            raise ConfigError(
                f"true_cfg_scale = {true_cfg_scale} must be 1 for a {self.pipeline_name}: its guidance_scale is "
                "already this guidance, or it has no guidance"
            )
        super().__init__()
        self.negative_prompt = negative_prompt
        self.pipeline, self.scheduler = pipeline, pipeline.scheduler
        self.denoiser_name = "unet" if getattr(pipeline, "unet", None) else "transformer"
        self.denoiser = getattr(pipeline, self.denoiser_name)
        self.decoder = pipeline.vae
        encoders = {name: getattr(pipeline, name, None) for name in ENCODERS}
        encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        self.text_encoders = list(encoders.values())
        self.lora_encoders = {name: encoder for name, encoder in encoders.items() if name in self.adaptable}
        self.decoder.encoder = self.decoder.quant_conv = None  # nothing here encodes pictures
        for module in (self.denoiser, self.decoder, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.device = self.denoiser.device
        self.latent_shape, *_ = map(self._shape_for, picture_sizes(resolution) or [None])

    @classmethod
    def load(
        cls, name: str, *, resolution: int | str | None = None, true_cfg_scale: float = 1.0, negative_prompt: str = "",
        **options,
    ):  # fmt: skip
        """Loads the model; `load_pipeline` in loading.py explains the other options and the errors."""
        pipeline = load_pipeline(cls, name, **options)
        own = {"resolution": resolution, "true_cfg_scale": true_cfg_scale, "negative_prompt": negative_prompt}
        return cls(pipeline, **own)

    @classmethod
    def modules_of(cls, without) -> list[str]:
        """Returns the parts of the pipeline that form the components to leave out.

        Args:
            without: the names of the components, keys of `optional`.

        Raises:
            ConfigError: the family needs one of these components.
        """
        for name in without:
            if name not in cls.optional:
                allowed = " or ".join(map(repr, cls.optional)) or "empty"
                raise ConfigError(f"pretrained.without = {name!r} must be {allowed} for a {cls.pipeline_name}")
        return [module for name in without for module in cls.optional[name]]

    @classmethod
    def pipeline_class(cls) -> type:
        import diffusers

        return getattr(diffusers, cls.pipeline_name)

    # ---- families override these

    def latent_channels(self) -> int:
        """Returns the number of channels of x[0]."""
        return self.decoder.config.latent_channels

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Returns height and width of x[0] for pictures of (height, width) pixels; None is the model's own size.

        Raises:
            ConfigError: `size` is None, and the model's configuration names none.
        """
        if size is None:
            own = self.denoiser.config.get("sample_size")
            if not own:
                raise ConfigError("resolution = None: the model's files name no size (sample_size), so give one")
            return (own, own) if isinstance(own, int) else tuple(own)
        return size[0] // self.vae_factor, size[1] // self.vae_factor

    @property
    def takes_guidance(self) -> bool:
        """Says whether `guidance_scale` changes anything."""
        return True

    @property
    def vae_factor(self) -> int:
        """The side of a picture divided by the side of the VAE's latents."""
        return 2 ** (len(self.decoder.config.block_out_channels) - 1)

    def mixing_scale(self, guidance_scale: float) -> float:
        """Returns g in f = u + g·(c - u), the formula that mixes two branches."""
        return guidance_scale

    def schedule(self, num_inference_steps: int) -> dict:
        """Returns the further arguments that the pipeline passes to its scheduler's `set_timesteps`."""
        return {}

    # ---- the same for most families

    def of_size(self, size: tuple[int, int]) -> "LatentDiffusion":
        model = copy(self)
        model.latent_shape = self._shape_for(size)
        return model

    def _shape_for(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        unit = 2 * self.vae_factor
        if size and any(side % unit for side in size):
            raise ConfigError(f"resolution = {size_name(size)} must be a multiple of {unit} in width and height")
        return self.latent_channels(), *self.latent_size(size)

    def init_latents(self, generators: list[torch.Generator]) -> torch.Tensor:
        noise = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])
        return noise.to(self.device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.decoder.config
        latents = latents.to(self.decoder.dtype) / config.scaling_factor + (config.get("shift_factor") or 0)
        return self.pictures(latents)

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents that are in the scale of the VAE, into images [B, 3, H, W] in [0, 1]."""
        return (self.decoder.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder, tensors: dict[str, torch.Tensor], scale: float) -> None:
        """Writes `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` reads.

        Args:
            tensors: both factors of each layer, with the names of lora/networks.py.
            scale: alpha / rank.
        """
        parts, options = {}, {}
        for name, tensor in tensors.items():
            encoder, inner = split_name(name)
            parts.setdefault(encoder or self.denoiser_name, {})[inner] = tensor
        for part, layers in parts.items():
            metadata = _adapter_metadata(layers, scale, endings=part in ENCODERS)
            options |= {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        self.pipeline_class().save_lora_weights(folder, safe_serialization=True, **options)


def _adapter_metadata(layers: dict[str, torch.Tensor], scale: float, endings: bool) -> dict | None:
    """Returns the entries from which diffusers makes a `LoraConfig`.

    It is None if alpha = rank, because readers of the file assume that for each layer.

    Args:
        endings: whether to name layers by their endings, because the full names in a text encoder differ between
            versions of transformers.
    """
    if scale == 1:
        return None
    modules = sorted(name.removesuffix(".lora_A.weight") for name in layers if name.endswith("lora_A.weight"))
    rank = max(len(tensor) for name, tensor in layers.items() if name.endswith("lora_A.weight"))
    targets = sorted({name.split(".")[-1] for name in modules}) if endings else modules
    return {"r": rank, "lora_alpha": scale * rank, "target_modules": targets}


def resolution_shift(scheduler, tokens: int, max_shift: float = 1.15) -> float:
    """Returns mu, the shift of the noise levels for pictures of `tokens` tokens.

    It is linear in the number of tokens. The scheduler's configuration names its values at two sizes (Esser et al.
    2024, arXiv 2403.03206, 5.3.2).
    """
    config = scheduler.config
    small, large = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (large - small)
    return tokens * slope + (low - slope * small)


def even_sigmas(num_inference_steps: int) -> list[float]:
    """Returns the noise levels 1 … 1/N, which some pipelines use instead of those of their scheduler."""
    return torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
