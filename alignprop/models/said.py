"""Reads what the files of a model say about it, in their names, their headers and the names of their tensors."""

import os
import re
import sys
from pathlib import Path

from diffusers import DDIMScheduler
from safetensors import safe_open


def only_variant(folder: str) -> str | None:
    """Returns the variant to load from a pipeline's folder, such as "fp16", if some part has no plain weight files.

    It is the variant that most of these parts have, and a message names it. diffusers then loads this variant of every
    part that has it, and the plain files of the other parts. None: every part has plain files.
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
            f"pretrained.model = {folder!r}: loading the variant {variant!r} of {parts}, which have no plain weight "
            "files",
            file=sys.stderr,
        )
    return variant


def said_by(path: str) -> dict:
    """Reads from a `.safetensors` file how its model was trained, as fields of a scheduler's configuration.

    Trainers write empty tensors `v_pred` and `ztsnr` into the file, which ComfyUI reads, or "modelspec.prediction_type"
    into its header, which is the standard of Stability AI.
    """
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        keys, header = set(file.keys()), file.metadata() or {}
    spelled = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    kind = "v_prediction" if "v_pred" in keys else spelled.get(header.get("modelspec.prediction_type", ""))
    said = {"prediction_type": kind} if kind else {}
    if "ztsnr" in keys:  # the last timestep is pure noise, so the chain must begin there
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said


def follow(scheduler, said: dict, name: str):
    """Returns the scheduler, changed where the file says something else than the scheduler's configuration.

    A message reports the change. Flow-matching schedulers are never changed. A scheduler whose class lacks a field is
    replaced by a `DDIMScheduler`.

    Args:
        said: the result of `said_by`.
        name: the name of the file, for the message.
    """
    other = {field: value for field, value in said.items() if scheduler.config.get(field) != value}
    if not other or type(scheduler).__name__.startswith("FlowMatch"):
        return scheduler
    if os.environ.get("RANK", "0") == "0":
        found = ", ".join(f"{field} = {value!r}" for field, value in other.items())
        given = ", ".join(repr(scheduler.config.get(field)) for field in other)
        print(
            f"pretrained.model = {name!r} says {found}, and its configuration {given}; using the file's values",
            file=sys.stderr,
        )
    cls = type(scheduler) if all(field in scheduler.config for field in other) else DDIMScheduler
    return cls.from_config(scheduler.config, **other)
