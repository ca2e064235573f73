"""What the files of a model say of themselves, by their names, their headers and their tensors' names."""

import os
import re
import sys
from pathlib import Path

from diffusers import DDIMScheduler
from safetensors import safe_open


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
