"""Presets of the model families. A preset states only how it differs from `align_prop.hps`.

    accelerate launch main.py --config config/models.py:sdxl --config.memory_policy=auto
    python main.py --config config/models.py:flux --plan --gpu_memory=80

The fields are those of config/align_prop.py. Pictures have the model's own size, and `resolution` can make them
smaller. `--plan` says what fits a GPU. All presets train a LoRA with the model in bfloat16.
"""

from ml_collections import ConfigDict

from alignprop.settings.errors import one_of
from config import align_prop


def family(model: str, num_inference_steps: int, guidance_scale: float) -> ConfigDict:
    """`hps` with another model, and the model's usual number of steps and guidance. It takes one sample at a time."""
    c = align_prop.hps()
    c.pretrained.model = model
    c.mixed_precision = "bf16"
    c.num_inference_steps = num_inference_steps
    c.guidance_scale = guidance_scale
    c.per_gpu_capacity = 1
    return c


def sdxl() -> ConfigDict:
    """Stable Diffusion XL at 1024²."""
    return family("stabilityai/stable-diffusion-xl-base-1.0", 50, 5.0)


def sdxl_turbo() -> ConfigDict:
    """SDXL-Turbo at 512²: a chain of 4 network calls without guidance, with gradient through all of them."""
    c = family("stabilityai/sdxl-turbo", 4, 1.0)
    c.sampler = "pipeline"
    c.estimator = "full"
    return c


def sd3() -> ConfigDict:
    """Stable Diffusion 3.5 medium at 1024², without T5, which has twice as many weights as the rest."""
    c = family("stabilityai/stable-diffusion-3.5-medium", 28, 4.5)
    c.pretrained.without = "t5"
    return c


def flux() -> ConfigDict:
    """FLUX.1-dev at 1024². FLUX.1-schnell needs 4 steps and guidance_scale=1."""
    return family("black-forest-labs/FLUX.1-dev", 28, 3.5)


def flux2() -> ConfigDict:
    """FLUX.2 [klein] base at 1024². The distilled klein needs 4 steps and guidance_scale=1."""
    return family("black-forest-labs/FLUX.2-klein-base-4B", 50, 4.0)


def z_image() -> ConfigDict:
    """Z-Image at 1024². Z-Image-Turbo needs 9 steps and guidance_scale=1."""
    return family("Tongyi-MAI/Z-Image", 50, 5.0)


PRESETS = {preset.__name__: preset for preset in (sdxl, sdxl_turbo, sd3, flux, flux2, z_image)}


def get_config(preset: str = "sdxl") -> ConfigDict:
    """Returns the preset's configuration. `--config config/models.py:<preset>` calls this function."""
    config = PRESETS[one_of("preset", preset, PRESETS)]()
    config.preset = preset
    return config
