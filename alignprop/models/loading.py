"""Loads a diffusers pipeline from a hub name, a folder or a single file; every error message is one line."""

import json
import os
from pathlib import Path

import diffusers
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from alignprop.models import FAMILIES, OLDEST
from alignprop.models.base import ENCODERS
from alignprop.models.denoiser_file import FIELD as DENOISER
from alignprop.models.denoiser_file import load_denoiser
from alignprop.models.prequantized import adopt_parts
from alignprop.models.said import follow, only_variant, said_by
from alignprop.models.whole import refuse_gaps, set_precision, whole_parts
from alignprop.settings.errors import ConfigError

PRECISIONS = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # the dtype of frozen weights for each value of mixed_precision
SINGLE_FILE = (".safetensors", ".ckpt")
INDEX = "model_index.json"


def load_model(name: str, train_text_encoder: bool = False, **options):
    """Loads a text-to-image model of any family.

    Args:
        name: hub name, local folder, or single file.
        train_text_encoder: whether text encoders are trained. The LoRA files of the family must be able to hold them.
        options: `resolution` and `true_cfg_scale` (latent.py), and the options of `load_pipeline`.

    Raises:
        ConfigError: `family_of` or `load_pipeline` fails, or LoRA files of the family cannot hold text encoders.
    """
    cls = FAMILIES[family_of(name, options.get("revision"), options.get("config"))].model_class
    if train_text_encoder and not cls.adaptable:
        raise no_place_for_encoders(cls.pipeline_name)
    return cls.load(name, **options)


def no_place_for_encoders(pipeline: str) -> ConfigError:
    return ConfigError(f"train_text_encoder = True: LoRA files of a {pipeline} cannot hold text encoders")


def family_of(name: str, revision: str | None = None, config: str | None = None) -> str:
    """Reads the family of a pipeline from its `model_index.json`.

    A single file has the family of the pipeline that `config` names, or without `config` the family "sd".

    Raises:
        ConfigError: there is no such file, or it names a pipeline of no known family.
    """
    place, field = name, "pretrained.model"
    if Path(name).suffix in SINGLE_FILE:
        if config is None:
            return OLDEST
        place, field, revision = config, "pretrained.config", None
    try:
        index = _index(place, revision)
    except Exception as error:  # damaged files and the hub's client fail in many ways
        raise could_not_load(field, place, error) from error
    named = index.get("_class_name") if isinstance(index, dict) else None
    for family, facts in FAMILIES.items():
        if facts.pipeline == named:
            return family
    known = ", ".join(facts.pipeline for facts in FAMILIES.values())
    raise ConfigError(f"{field} = {place!r} is a {named!r}, not one of {known}")


def load_pipeline(
    cls, name: str, *, revision=None, variant=None, config=None, dtype=torch.float32, full=False, vae=None, without=(),
    denoiser=None,
):  # fmt: skip
    """Loads a diffusers pipeline with the modules that training needs.

    Args:
        cls: the Model class of the family (latent.py).
        name: hub name, local folder, or a single `.safetensors` or `.ckpt` file.
        revision: branch, tag or commit on the hub; None is the newest.
        variant: the variant of the weight files, such as "fp16". None is the plain files; if some part of a local
            folder has no plain files, it is a variant that this part has.
        config: for a single file, the hub name or folder of a pipeline of the same layout, which supplies the
            configuration and the tokenizer. With None diffusers chooses it by the keys of the file.
        dtype: the dtype of the weights.
        full: whether the denoiser's weights are trained. They then stay float32 whatever `dtype` is.
        vae: hub name or folder of another VAE for the model.
        without: names of the components to leave out (`optional` in latent.py).
        denoiser: a denoiser of its own, instead of the pipeline's (denoiser_file.py).

    Raises:
        ConfigError: nothing can be loaded under that name, or a component cannot be left out.
    """
    own = own_denoiser(cls, name, revision, denoiser, stored := torch.float32 if full else dtype)
    left_out = cls.modules_of(without)
    options = {name: None for name in (*cls.unused, *left_out, *own)} | cls.load_options
    try:
        check_reachable(name, revision)
        with whole_parts():
            if Path(name).suffix in SINGLE_FILE:
                absent = dict.fromkeys(("safety_checker", "feature_extractor", *left_out))
                options = {part: None for part in options if part in absent}
                pipeline = cls.pipeline_class().from_single_file(name, config=config, dtype=stored, **options)
                pipeline.scheduler = follow(pipeline.scheduler, said_by(name), name)
            else:
                variant = variant or (only_variant(name) if os.path.isdir(name) else None)
                pipeline = cls.pipeline_class().from_pretrained(
                    name, revision=revision, variant=variant, dtype=stored, **options
                )
        pipeline.register_modules(**own)
        refuse_gaps(pipeline)
    except Exception as error:
        raise could_not_load("pretrained.model", name, error) from error
    adopt_parts(pipeline, dtype, full)
    fit_tokenizers(pipeline, name, left_out)
    if vae is not None:
        pipeline.vae = load_vae(vae, pipeline.vae)
    half_overflows = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    wanted = {"vae": torch.float32 if half_overflows else dtype, **dict.fromkeys(ENCODERS, dtype)}
    for part, precision in wanted.items():
        module = getattr(pipeline, part, None)
        if module is not None and module.dtype != precision:
            set_precision(module, precision)
    return pipeline


def own_denoiser(cls, name: str, revision, denoiser: str | None, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Returns the denoiser that replaces the pipeline's, by its name in the pipeline; empty if none does.

    Raises:
        ConfigError: it cannot be loaded, or the pipeline is a single file.
    """
    if denoiser is None:
        return {}
    if Path(name).suffix in SINGLE_FILE:
        raise ConfigError(f"{DENOISER} = {denoiser!r} needs a pipeline as pretrained.model, and {name!r} is a file")
    try:
        index = _index(name, revision)
    except Exception as error:
        raise could_not_load("pretrained.model", name, error) from error
    part = "unet" if "unet" in index else "transformer"
    try:
        with whole_parts():
            return {part: load_denoiser(denoiser, index[part][1], part, name, dtype)}
    except ConfigError:
        raise
    except Exception as error:
        raise could_not_load(DENOISER, denoiser, error) from error


def fit_tokenizers(pipeline, name: str, left_out) -> None:
    """Makes each tokenizer truncate prompts to the length of its text encoder.

    Its files may name no length, or a longer one.

    Args:
        pipeline: the loaded pipeline.
        name: the name that it was loaded from, for an error message.
        left_out: the parts that may be absent.

    Raises:
        ConfigError: a tokenizer or a text encoder is absent.
    """
    for part in pipeline.components:
        if part.startswith(("tokenizer", "text_encoder")) and getattr(pipeline, part) is None and part not in left_out:
            raise ConfigError(f"pretrained.model = {name!r} has no {part}, which a {type(pipeline).__name__} needs")
    for part in ENCODERS:
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"), None)
        longest = getattr(getattr(getattr(pipeline, part, None), "config", None), "max_position_embeddings", None)
        if tokenizer is not None and longest:
            tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def load_vae(name: str, other):
    """Loads a VAE that replaces another one.

    Raises:
        ConfigError: `name` is not a VAE, or its latents have another number of channels.
    """
    try:
        check_reachable(name, None, "config.json")
        named = type(other).load_config(name).get("_class_name", "")
        cls = getattr(diffusers, named) if named.startswith("Autoencoder") else type(other)
        with whole_parts():
            vae = cls.from_pretrained(name)
    except Exception as error:
        raise could_not_load("pretrained.vae", name, error) from error
    channels = vae.config.latent_channels
    if channels != other.config.latent_channels:
        raise ConfigError(
            f"pretrained.vae = {name!r} has latents of {channels} channels, and this model's have "
            f"{other.config.latent_channels}"
        )
    return vae


def check_reachable(name: str, revision: str | None, filename: str = INDEX) -> None:
    """Raises at once the error that loading would raise after half a minute of retries."""
    if os.path.exists(name):
        return
    if Path(name).suffix in SINGLE_FILE:
        raise FileNotFoundError("there is no such file")
    if not isinstance(try_to_load_from_cache(name, filename, revision=revision), str):
        get_hf_file_metadata(hf_hub_url(name, filename, revision=revision), timeout=10)


def could_not_load(field: str, name: str, error: Exception) -> ConfigError:
    where = "this folder or file" if os.path.exists(name) else f"a local path, {HF_HUB_CACHE}, the hub"
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    advice = "give a local pipeline folder or a single .safetensors file, or set HF_HOME to a cache that holds it"
    if os.path.exists(name):
        advice = "give a pipeline's folder, or a single file that holds denoiser, VAE and text encoders"
    return ConfigError(
        f"{field} = {name!r} could not be loaded (tried {where}): {type(error).__name__}: {reason} — {advice}"
    )


def _index(name: str, revision: str | None) -> dict:
    if os.path.isdir(name):
        return json.loads(Path(name, INDEX).read_text(encoding="utf-8"))
    check_reachable(name, revision)
    return json.loads(Path(hf_hub_download(name, INDEX, revision=revision)).read_text(encoding="utf-8"))
