"""The model families: the one place, besides a family's own file, that knows their names."""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        pipeline: the diffusers pipeline class that a `model_index.json` of the family names.
        module, cls: where the family's Model is.
        guidance_offset: the number by which its pipeline's guidance scale exceeds the one here, of which 1 is none.
    """

    pipeline: str
    module: str
    cls: str
    guidance_offset: float = 0.0

    @property
    def model_class(self) -> type:
        return getattr(import_module(self.module), self.cls)


FAMILIES = {
    "sd": Family("StableDiffusionPipeline", "alignprop.models.sd", "StableDiffusion"),
    "sdxl": Family("StableDiffusionXLPipeline", "alignprop.models.sdxl", "StableDiffusionXL"),
    "sd3": Family("StableDiffusion3Pipeline", "alignprop.models.sd3", "StableDiffusion3"),
    "flux": Family("FluxPipeline", "alignprop.models.flux", "Flux"),
    "flux2": Family("Flux2KleinPipeline", "alignprop.models.flux2", "Flux2Klein"),
    "z_image": Family("ZImagePipeline", "alignprop.models.z_image", "ZImage", guidance_offset=-1.0),
}
OLDEST = "sd"  # what a single file is taken for that comes without a configuration
