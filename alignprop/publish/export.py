"""A trained LoRA for other tools: in kohya's format (lora/kohya.py), in diffusers' own, or merged into its base model.

What was written gets its name only when it is whole. On request it is read again, also by diffusers, and every layer's
ΔW is compared with the checkpoint's (verification.py).
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alignprop.lora import kohya
from alignprop.lora.adapters import split
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import read_lora
from alignprop.lora.kohya_names import find_format
from alignprop.models.base import Model, split_name
from alignprop.models.configs import find_config
from alignprop.publish.merging import INDEX, merge, merged_deltas, pipeline_folder
from alignprop.publish.verification import (
    Check,
    compare,
    diffusers_deltas,
    own_deltas,
    rounding,
    weightless,
)
from alignprop.runs.checkpoint import find_checkpoint, run_folder_of
from alignprop.settings.errors import ConfigError, one_of

FORMATS = ("kohya", "diffusers", "merged")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_lora(
    checkpoint, out, form: str, *, base: str = "", dtype: str = "", force: bool = False, verify: bool = False
) -> Check | None:
    """Writes the LoRA of a checkpoint as a file, or the base model with it as a pipeline's folder.

    Args:
        checkpoint: a checkpoint folder, a run folder for its newest, or a LoRA file in diffusers' or kohya's format.
        out: the `.safetensors` file to write; for "merged" the folder.
        form: one of FORMATS. "kohya" is diffusers' own where kohya's could not be read by all, see lora/kohya_names.py.
        base: the pipeline folder or hub name that the LoRA is for; empty: the one that the checkpoint's run names.
        dtype: of the factors, one of DTYPES; empty: float32. Merged weights have the base's own.
        force: replaces the file or the pipeline's folder that is there already.
        verify: reads again what was written, and compares.

    Returns:
        What the comparison found; None without `verify`.

    Raises:
        ConfigError: something is missing, does not fit, is in the way, cannot be held by `dtype`, or is not read as it
            was written.
    """
    one_of("format", form, FORMATS)
    if dtype and form == "merged":
        raise ConfigError(f"dtype = {dtype!r} has no effect with format = 'merged': weights keep the base model's")
    dtype = DTYPES[one_of("dtype", dtype or "float32", DTYPES)]
    out = _check_out(Path(out), form, force)
    checkpoint = find_checkpoint(str(checkpoint), "logs", "checkpoint")
    name, revision = (base, None) if base else _base_of(checkpoint, form)
    try:
        facts = find_config(name, revision)
    except ConfigError as error:
        raise ConfigError(f"base = {name!r}: {error}") from error
    model = weightless(facts)
    weights = _read(checkpoint, model)
    if form == "merged":
        folder = pipeline_folder(name, revision)
        _check_apart(out, folder)
        with _in_place_of(out) as temporary:
            merge(weights, folder, temporary)
            return compare(weights, *merged_deltas(weights, folder, temporary)) if verify else None
    tensors, header = _contents(weights, model, form)
    stored = {k: t if k.endswith(".alpha") else t.to(dtype).contiguous() for k, t in tensors.items()}
    _check_precision(tensors, stored, dtype)
    with _in_place_of(out) as temporary:
        save_file(stored, temporary, {"format": "pt", **header})
        if not verify:
            return None
        compare(weights, own_deltas(read_lora(temporary, model)), rounding(weights, dtype))
        return compare(weights, diffusers_deltas(temporary, model), rounding(weights, dtype))


def _contents(weights: LoraWeights, model: Model, form: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a LoRA file, in float32, and its header."""
    if form == "kohya" and find_format(model.denoiser):
        return kohya.pack(weights.tensors, weights.scale, model)
    # Only diffusers itself reads the scale in its header; without one, every tool takes 1.
    tensors = {k: weights.scale * t if k.endswith("lora_B.weight") else t for k, t in weights.tensors.items()}
    return {k if split_name(k)[0] else f"{model.denoiser_name}.{k}": tensor for k, tensor in tensors.items()}, {}


def _check_precision(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses factors that overflow in `dtype` or come out as nothing: a LoRA that would silently do something else.

    Raises:
        ConfigError: with the first of them.
    """
    step = torch.finfo(dtype).eps
    for name, tensor in tensors.items():
        error = (stored[name].float() - tensor.float()).abs().max()
        if not error <= step * tensor.abs().max():  # also where it is not a number
            raise ConfigError(f"dtype = '{str(dtype).removeprefix('torch.')}' cannot hold {name!r}; float32 can")


# ---- where it comes from


def _base_of(checkpoint: Path, form: str) -> tuple[str, str | None]:
    """(hub name or folder, revision) of the base model, from the config.json of the checkpoint's run."""
    run = run_folder_of(checkpoint if checkpoint.is_dir() else checkpoint.parent)
    pretrained = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        pretrained = json.loads((run / "config.json").read_text(encoding="utf-8"))["pretrained"]
    name, config = pretrained.get("model"), pretrained.get("config")
    if not name:
        raise ConfigError(f"--base is needed: {str(checkpoint)!r} is in no run folder that names its model")
    if Path(name).suffix not in (".safetensors", ".ckpt"):
        return name, pretrained.get("revision")
    if config and form != "merged":
        return config, None
    raise ConfigError(
        f"--base is needed, a pipeline's folder: the run's own model is the single file {name!r}, of which "
        "from_single_file(…).save_pretrained(…) writes one"
    )


def _read(checkpoint: Path, model: Model) -> LoraWeights:
    if (checkpoint / "denoiser").is_dir():
        raise ConfigError(f"checkpoint = {str(checkpoint)!r} has no LoRA, but whole weights, in its folder denoiser/")
    weights = read_lora(checkpoint, model)
    split(model, weights)  # which checks it
    return weights


# ---- where it goes to


def _check_out(out: Path, form: str, force: bool) -> Path:
    if form != "merged" and out.suffix != ".safetensors":
        raise ConfigError(f"out = {str(out)!r} must end in .safetensors")
    if os.path.lexists(out) and not force:
        raise ConfigError(f"out = {str(out)!r} exists; --force replaces it")
    if form == "merged" and out.exists() and not (out / INDEX).is_file():
        raise ConfigError(f"out = {str(out)!r} is no pipeline's folder, and will not be replaced by one")
    if form != "merged" and out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a folder, and will not be replaced by a file")
    return out


def _check_apart(out: Path, base: Path) -> None:
    ours, theirs = out.resolve(), base.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ConfigError(f"out = {str(out)!r} must be neither the base model's folder nor in it nor around it")


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """A path beside `out`, to write to. What is there takes its place when all went well, and is removed when not."""
    temporary = out.with_name(f"writing_{out.name}")
    try:
        _remove(temporary)
        yield temporary
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"out = {str(out)!r} could not be written: {' '.join(str(error).split())}") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
