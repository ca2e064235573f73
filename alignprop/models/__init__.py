"""The model families. Only this file and the files of the families know their names."""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Family:
    """The place of a model family.

    Attributes:
        pipeline: the diffusers pipeline class that a `model_index.json` of the family names.
        module: the module of the family's Model.
        cls: the class of the family's Model.
        guidance_offset: the pipeline's guidance scale minus ours. Ours is 1 without guidance.
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
OLDEST = "sd"  # the family of a single file without a configuration
