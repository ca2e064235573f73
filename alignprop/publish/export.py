"""Exports a trained LoRA: in kohya's format (lora/kohya.py), in diffusers' format, or merged into its base model.

An export gets its final name only when it is complete. On request it is read again, also by diffusers, and every
layer's ΔW is compared with the checkpoint's (verification.py).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alignprop.lora import kohya
from alignprop.lora.adapters import split
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import make_readable, read_lora
from alignprop.lora.kohya_names import find_format
from alignprop.lora.soups import mix
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
from alignprop.runs.manifest import check_same_base
from alignprop.settings.errors import ConfigError, one_of

FORMATS = ("kohya", "diffusers", "merged")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_lora(
    checkpoint, out, form: str, *, base: str = "", dtype: str = "", force: bool = False, verify: bool = False,
    scale: float = 1.0, mix_with="", mixing_coef: float | None = None,
) -> Check | None:  # fmt: skip
    """Writes the LoRA of a checkpoint to a file, or the base model with the LoRA to a pipeline folder.

    Args:
        checkpoint: a checkpoint folder, a run folder for its newest checkpoint, or a LoRA file that `read_lora` reads.
        out: the `.safetensors` file to write; for "merged" the folder.
        form: one of FORMATS. "kohya" writes diffusers' format if tools do not agree on the names of the model's layers
            in kohya's (lora/kohya_names.py).
        base: the pipeline folder or hub name that the LoRA is for; empty means the model of the checkpoint's run.
        dtype: the type of the factors, one of DTYPES; empty means float32. Merged weights keep the base model's type.
        force: replaces an existing file or pipeline folder.
        verify: reads the export again, and compares it with the checkpoint.
        scale: multiplies the weight changes, as `lora_scale` does in an evaluation.
        mix_with: a second checkpoint, in the forms of the first. The export is then the mixture c·first + (1-c)·second
            of their weight changes (mode "delta" of lora/soups.py). Empty exports the first alone.
        mixing_coef: c, if there is a second checkpoint. None means 0.5.

    Returns:
        The result of the comparison; None without `verify`.

    Raises:
        ConfigError: an input is missing or does not fit, `out` exists, `dtype` cannot hold a factor, or the export
            reads differently from the checkpoint.
    """
    one_of("format", form, FORMATS)
    share = _check_numbers(scale, mix_with, mixing_coef)
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
    if mix_with:
        second = find_checkpoint(str(mix_with), "logs", "mix_with")
        check_same_base(checkpoint, second, "mix_with")
        weights = mix(weights, _read(second, model, "mix_with"), share, "delta")
    weights = replace(weights, scale=weights.scale * scale)
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
        make_readable(temporary)
        if not verify:
            return None
        compare(weights, own_deltas(read_lora(temporary, model)), rounding(weights, dtype))
        return compare(weights, diffusers_deltas(temporary, model), rounding(weights, dtype))


def _check_numbers(scale: float, mix_with, mixing_coef: float | None) -> float:
    """Returns the share of the first checkpoint in a mixture, after checking the numbers of an export.

    Raises:
        ConfigError: a share is given without a mixture, a number is not finite, or the scale is 0.
    """
    if mixing_coef is not None and not mix_with:
        raise ConfigError(f"mixing_coef = {mixing_coef} needs mix_with, a second checkpoint")
    share = 0.5 if mixing_coef is None else mixing_coef
    if not (math.isfinite(scale) and scale and math.isfinite(share)):
        raise ConfigError(f"scale = {scale} and mixing_coef = {share} must be finite numbers, and scale not 0")
    return share


def _contents(weights: LoraWeights, model: Model, form: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a LoRA file, in float32, and its header."""
    if form == "kohya" and find_format(model.denoiser):
        return kohya.pack(weights.tensors, weights.scale, model)
    # Only diffusers reads the scale in its header. Without a header every tool assumes 1, so B includes the scale.
    tensors = {k: weights.scale * t if k.endswith("lora_B.weight") else t for k, t in weights.tensors.items()}
    return {k if split_name(k)[0] else f"{model.denoiser_name}.{k}": tensor for k, tensor in tensors.items()}, {}


def _check_precision(tensors: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses factors that overflow or vanish in `dtype`, because such a LoRA would silently do something else.

    Raises:
        ConfigError: `dtype` cannot hold a factor; the message names the first one.
    """
    step = torch.finfo(dtype).eps
    for name, tensor in tensors.items():
        error = (stored[name].float() - tensor.float()).abs().max()
        if not error <= step * tensor.abs().max():  # `not` also covers an error that is NaN.
            raise ConfigError(f"dtype = '{str(dtype).removeprefix('torch.')}' cannot hold {name!r}; float32 can")


# ---- The source


def _base_of(checkpoint: Path, form: str) -> tuple[str, str | None]:
    """Returns (hub name or folder, revision) of the base model, from the config.json of the checkpoint's run."""
    run = run_folder_of(checkpoint if checkpoint.is_dir() else checkpoint.parent)
    pretrained = {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        pretrained = json.loads((run / "config.json").read_text(encoding="utf-8"))["pretrained"]
    name, config = pretrained.get("model"), pretrained.get("config")
    if not name:
        raise ConfigError(f"--base is needed: {str(checkpoint)!r} is in no run folder that names its model")
    if (denoiser := pretrained.get("denoiser")) and form == "merged":
        raise ConfigError(
            f"--base must name a pipeline folder with the weights of pretrained.denoiser = {denoiser!r}, on which the "
            "run trained its LoRA"
        )
    if Path(name).suffix not in (".safetensors", ".ckpt"):
        return name, pretrained.get("revision")
    if config and form != "merged":
        return config, None
    raise ConfigError(
        f"--base must name a pipeline folder, because the run's own model is the single file {name!r}; "
        "from_single_file(…).save_pretrained(…) converts it to such a folder"
    )


def _read(checkpoint: Path, model: Model, field: str = "checkpoint") -> LoraWeights:
    if (checkpoint / "denoiser").is_dir():
        raise ConfigError(
            f"{field} = {str(checkpoint)!r} has full weights (in denoiser/) and no LoRA, so there is nothing to export"
        )
    weights = read_lora(checkpoint, model)
    split(model, weights)  # This checks that every tensor has a place in the model.
    return weights


# ---- The destination


def _check_out(out: Path, form: str, force: bool) -> Path:
    if form != "merged" and out.suffix != ".safetensors":
        raise ConfigError(f"out = {str(out)!r} must end in .safetensors")
    if os.path.lexists(out) and not force:
        raise ConfigError(f"out = {str(out)!r} exists; --force replaces it")
    if form == "merged" and out.exists() and not (out / INDEX).is_file():
        raise ConfigError(f"out = {str(out)!r} exists and is not a pipeline folder, so it is not replaced")
    if form != "merged" and out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a folder, and will not be replaced by a file")
    return out


def _check_apart(out: Path, base: Path) -> None:
    ours, theirs = out.resolve(), base.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ConfigError(
            f"out = {str(out)!r} must not be the base model's folder, a folder inside it, or a folder that contains it"
        )


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """Yields a path next to `out` to write to; at the end it is renamed to `out`, or removed after an error."""
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
