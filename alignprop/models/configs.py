"""Finds the facts from which a model can be built without weights: its classes and their configurations.

The facts come from a pipeline's folder, from the Hugging Face cache, or from `alignprop/assets/configs/`. The files
there hold the configurations of released models, without the entries that equal the defaults of the diffusers or
transformers class. The facts of a text-to-image model are

    {"family": …, "denoiser": {…}, "vae": {…}, "text_encoders": [{…}, …], "scheduler": {…}, "pipeline": {…}}

and the facts of a reward's towers are {"family": "clip", "model": {…}}. "pipeline" holds the arguments of the pipeline
itself. Every other {…} holds the configuration of one part, with the name of its class as "_class_name".
"""

import json
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from alignprop.models import FAMILIES
from alignprop.settings.errors import ConfigError

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "configs"
TOWERS = {
    "clip": "CLIPModel", "siglip": "SiglipModel", "blip": "BlipForImageTextRetrieval", "qwen2_vl": "Qwen2VLModel",
    "dinov2": "Dinov2Model", "dinov3_vit": "DINOv3ViTModel", "mask2former": "Mask2FormerForUniversalSegmentation",
    "vlm": "AutoModelForImageTextToText",  # of any type
}  # fmt: skip


def find_config(name: str, revision: str | None = None) -> dict:
    """Finds the facts of a text-to-image model, in a folder, in the bundled files or in the Hugging Face cache.

    It downloads nothing.

    Args:
        name: the folder or hub name of a diffusers pipeline.
        revision: branch, tag or commit to look for in the cache; None is the newest.

    Raises:
        ConfigError: no facts are found, or the files are damaged or of an unknown family.
    """
    if os.path.isdir(name):
        return folder_config(name)
    facts = bundled_config(name)
    if facts is not None and facts["family"] not in TOWERS:
        return facts
    index = _cached(name, "model_index.json", revision)
    if index is not None:
        return folder_config(index.parent)
    raise ConfigError(f"pretrained.model = {name!r}: {_nowhere(FAMILIES)}")


def find_tower_config(name: str, field: str, family: str | tuple[str, ...] = "clip") -> dict:
    """Finds the facts of a reward's image and text towers, in the same places as `find_config`.

    Args:
        name: a folder or hub name.
        field: the field of the configuration that an error message names.
        family: the family that the towers must have, a key of TOWERS, or several that they may have.

    Raises:
        ConfigError: no facts are found, or the files are damaged or of another family.
    """
    families = (family,) if isinstance(family, str) else family
    facts = bundled_config(name)
    if not os.path.isdir(name) and facts is not None and facts["family"] in families:
        return facts
    path = Path(name, "config.json") if os.path.isdir(name) else _cached(name, "config.json", None)
    if path is None:
        raise ConfigError(f"{field} = {name!r}: {_nowhere(families)}")
    config = _read(path)
    found = next((one for one in families if one in ("vlm", config.get("model_type"))), None)
    if found is None:
        expected = " or ".join(map(repr, families))
        raise ConfigError(f"{field} = {name!r} is a {config.get('model_type')!r} model, expected {expected}")
    return {"family": found, "model": {"_class_name": TOWERS[found], **config}}


def bundled_config(name: str) -> dict | None:
    """Returns the bundled facts of the model or towers with that hub name, in any case; None if there are none."""
    return next((facts for facts in _bundled() if name.lower() in map(str.lower, facts["hub_names"])), None)


def folder_config(folder) -> dict:
    """Reads the facts of a diffusers pipeline from the configuration files in its folder.

    Raises:
        ConfigError: a file is missing or damaged, or the pipeline is of no known family.
    """
    folder = Path(folder)
    index = _read(folder / "model_index.json")
    family = next((name for name, f in FAMILIES.items() if f.pipeline == index.get("_class_name")), None)
    if family is None:
        known = ", ".join(f.pipeline for f in FAMILIES.values())
        raise ConfigError(f"pretrained.model = {str(folder)!r} is a {index.get('_class_name')!r}, not one of {known}")

    def facts(part, filename="config.json"):
        if part not in index:
            raise ConfigError(f"pretrained.model: {str(folder / 'model_index.json')!r} names no {part}")
        # The class comes from the index, because transformers' files do not name the one that the pipeline uses.
        return {**_read(folder / part / filename), "_class_name": index[part][1]}

    encoders = [f"text_encoder{suffix}" for suffix in ("", "_2", "_3")]
    return {
        "family": family,
        "denoiser": facts("transformer" if "transformer" in index else "unet"),
        "vae": facts("vae"),
        "text_encoders": [facts(part) for part in encoders if index.get(part, [None])[0]],
        "scheduler": facts("scheduler", "scheduler_config.json"),
        "pipeline": {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)},
    }


def _bundled() -> list[dict]:
    return [_read(path) for path in sorted(BUNDLED.glob("*.json"))]


def _cached(name: str, filename: str, revision: str | None) -> Path | None:
    try:
        path = try_to_load_from_cache(name, filename, revision=revision)
    except HFValidationError:  # the name is a path, not a hub name
        return None
    return Path(path) if isinstance(path, str) else None


def _nowhere(families) -> str:
    known = [facts["hub_names"][0] for facts in _bundled() if facts["family"] in families]
    return (
        f"no such folder, not in the Hugging Face cache, and not one of the models with bundled configurations: {known}"
    )


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{str(path.parent)!r} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} is damaged: expected a JSON object")
    return content
