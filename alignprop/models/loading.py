"""From a name to a loaded diffusers pipeline: hub names, folders, single files; every failure is one line."""

import json
import os
import re
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import safe_open

from alignprop.models import FAMILIES, OLDEST
from alignprop.models.base import ENCODERS
from alignprop.settings.errors import ConfigError

PRECISIONS = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # by mixed_precision: of frozen weights
SINGLE_FILE = (".safetensors", ".ckpt")
INDEX = "model_index.json"


def load_model(name: str, train_text_encoder: bool = False, **options):
    """Loads a text-to-image model of any family.

    Args:
        train_text_encoder: it has to be of a family whose LoRA files have a place for text encoders.
        options: `resolution` and `true_cfg_scale` (latent.py), and those of `load_pipeline`.

    Raises:
        ConfigError: as `family_of` and `load_pipeline`, or of another family.
    """
    cls = FAMILIES[family_of(name, options.get("revision"), options.get("config"))].model_class
    if train_text_encoder and not cls.adaptable:
        raise no_place_for_encoders(cls.pipeline_name)
    return cls.load(name, **options)


def no_place_for_encoders(pipeline: str) -> ConfigError:
    return ConfigError(f"train_text_encoder = True: LoRA files of a {pipeline} have no place for text encoders")


def family_of(name: str, revision: str | None = None, config: str | None = None) -> str:
    """The family of a pipeline by its `model_index.json`; a single file's is that of `config`.

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
    cls, name: str, *, revision=None, variant=None, config=None, dtype=torch.float32, full=False, vae=None, without=()
):  # fmt: skip
    """A diffusers pipeline with the modules that training needs.

    Args:
        cls: the family's Model (latent.py).
        name: hub name, local folder, or a single `.safetensors` or `.ckpt` file.
        revision: branch, tag or commit on the hub; None is the newest.
        variant: of the weights' files, such as "fp16"; None is the plain ones or, where a part has none, what it has.
        config: for a single file, the hub name or folder of a pipeline of the same layout, which supplies the
            configuration and the tokenizer; None lets diffusers choose from the file's keys.
        dtype: of the weights.
        full: the denoiser's weights stay float32 whatever `dtype` is: they are to be trained.
        vae: hub name or folder of another VAE for the model.
        without: what the family can do without, and is to.

    Raises:
        ConfigError: nothing loadable under that name, or a part that cannot be left out.
    """
    options = {part: None for part in (*cls.unused, *cls.modules_of(without))} | cls.load_options
    stored = torch.float32 if full else dtype
    try:
        check_reachable(name, revision)
        if Path(name).suffix in SINGLE_FILE:
            options = {part: None for part in options if part in ("safety_checker", "feature_extractor")}
            pipeline = cls.pipeline_class().from_single_file(name, config=config, dtype=stored, **options)
            pipeline.scheduler = follow(pipeline.scheduler, said_by(name), name)
        else:
            variant = variant or (only_variant(name) if os.path.isdir(name) else None)
            pipeline = cls.pipeline_class().from_pretrained(
                name, revision=revision, variant=variant, dtype=stored, **options
            )
    except Exception as error:
        raise could_not_load("pretrained.model", name, error) from error
    if vae is not None:
        pipeline.vae = load_vae(vae, type(pipeline.vae))
    half_overflows = dtype == torch.float16 and pipeline.vae.config.get("force_upcast")
    wanted = {"vae": torch.float32 if half_overflows else dtype, **dict.fromkeys(ENCODERS, dtype)}
    for part, precision in wanted.items():
        module = getattr(pipeline, part, None)
        if module is not None and module.dtype != precision:
            module.to(dtype=precision)
    return pipeline


def only_variant(folder: str) -> str | None:
    """The variant, such as "fp16", that some part of a pipeline's folder has weights of and no plain ones; it is told.

    diffusers then takes it for every part that has it, and plain files for the others.
    """
    pattern = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
    variants: dict[str, set[str]] = {}
    for path in Path(folder).glob("*/*"):
        if match := pattern.fullmatch(path.name):
            variants.setdefault(path.parent.name, set()).add(match[1] or "")
    lacking = {part: found for part, found in variants.items() if "" not in found}
    if not lacking:
        return None
    every = sorted({variant for found in lacking.values() for variant in found})
    variant = max(every, key=lambda v: sum(v in found for found in lacking.values()))
    if os.environ.get("RANK", "0") == "0":
        parts = ", ".join(sorted(lacking))
        print(
            f"pretrained.model = {folder!r}: the variant {variant!r} of {parts}, without plain files", file=sys.stderr
        )
    return variant


def said_by(path: str) -> dict:
    """What a `.safetensors` file says of how it was trained, as fields of a scheduler's configuration.

    Trainers leave empty tensors `v_pred` and `ztsnr` in it (as ComfyUI reads them), or "modelspec.prediction_type" in
    its header (the standard of Stability AI).
    """
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        keys, header = set(file.keys()), file.metadata() or {}
    spelled = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    kind = "v_prediction" if "v_pred" in keys else spelled.get(header.get("modelspec.prediction_type", ""))
    said = {"prediction_type": kind} if kind else {}
    if "ztsnr" in keys:  # noise at the last timestep is pure, and so the chain has to begin there
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said


def follow(scheduler, said: dict, name: str):
    """The scheduler with what the file `name` says of itself; another one than its configuration's is told."""
    other = {field: value for field, value in said.items() if scheduler.config.get(field) != value}
    if not other or type(scheduler).__name__.startswith("FlowMatch"):
        return scheduler
    if os.environ.get("RANK", "0") == "0":
        found = ", ".join(f"{field} = {value!r}" for field, value in other.items())
        given = ", ".join(repr(scheduler.config.get(field)) for field in other)
        print(f"pretrained.model = {name!r} says {found}, its configuration {given}; the file counts", file=sys.stderr)
    cls = type(scheduler) if all(field in scheduler.config for field in other) else DDIMScheduler
    return cls.from_config(scheduler.config, **other)


def load_vae(name: str, cls: type):
    """
    Raises:
        ConfigError: `name` is no VAE of that class.
    """
    try:
        check_reachable(name, None, "config.json")
        return cls.from_pretrained(name)
    except Exception as error:
        raise could_not_load("pretrained.vae", name, error) from error


def check_reachable(name: str, revision: str | None, filename: str = INDEX) -> None:
    """Raises at once what loading would raise after half a minute of retries."""
    if os.path.exists(name):
        return
    if Path(name).suffix in SINGLE_FILE:
        raise FileNotFoundError("there is no such file")
    if not isinstance(try_to_load_from_cache(name, filename, revision=revision), str):
        get_hf_file_metadata(hf_hub_url(name, filename, revision=revision), timeout=10)


def could_not_load(field: str, name: str, error: Exception) -> ConfigError:
    where = "this folder or file" if os.path.exists(name) else f"a local path, {HF_HUB_CACHE}, the hub"
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return ConfigError(
        f"{field} = {name!r} could not be loaded (tried {where}): {type(error).__name__}: {reason} — "
        "give a local pipeline folder or a single .safetensors file, or set HF_HOME to a cache that holds it"
    )


def _index(name: str, revision: str | None) -> dict:
    if os.path.isdir(name):
        return json.loads(Path(name, INDEX).read_text(encoding="utf-8"))
    check_reachable(name, revision)
    return json.loads(Path(hf_hub_download(name, INDEX, revision=revision)).read_text(encoding="utf-8"))
