"""A LoRA merged into its base model: W + ΔW in float32, written as a diffusers pipeline in the base's own precision.

Weight files are rewritten one by one, so that the model need not fit into memory at once.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alignprop.lora import LoraWeights
from alignprop.rereading import Deltas
from alignprop.settings import ConfigError

INDEX = "model_index.json"


def pipeline_folder(name: str, revision: str | None) -> Path:
    """The folder of a pipeline: `name` itself, or what the Hugging Face cache has, or gets, under that hub name.

    Raises:
        ConfigError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, revision=revision))
    except Exception as error:  # the hub's client fails in many ways
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(f"base = {name!r} could not be loaded: {type(error).__name__}: {reason}") from error


def merge(weights: LoraWeights, base: Path, out: Path) -> None:
    """Writes the pipeline in the folder `base`, with the LoRA in its denoiser's weights, to the new folder `out`.

    Raises:
        ConfigError: the base has no such weights in safetensors files.
    """
    part, files = _denoiser_files(base)
    out.mkdir()
    shutil.copy(base / INDEX, out)
    for folder in (base / name for name in json.loads((base / INDEX).read_text(encoding="utf-8"))):
        if folder.is_dir():
            # Weights in another format would still be without the LoRA.
            unmerged = shutil.ignore_patterns("*.safetensors", "*.bin", "*.msgpack") if folder == part else None
            shutil.copytree(folder, out / folder.name, ignore=unmerged)
    absent = {*weights.modules}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        for module in weights.modules:
            if (weight := tensors.get(f"{module}.weight")) is not None:
                tensors[f"{module}.weight"] = (weight.float() + weights.delta(module)).to(weight.dtype)
                absent.discard(module)
        save_file(tensors, out / part.name / path.name, header)
    if absent:
        raise ConfigError(f"the weight files in {str(part)!r} have no {min(absent) + '.weight'!r}; are they whole?")


def merged_deltas(weights: LoraWeights, base: Path, out: Path) -> tuple[Deltas, Callable[[str], float]]:
    """W' - W of every adapted layer, as written, and how far its rounding may change it; see `rereading.compare`."""
    part, files = _denoiser_files(base)
    deltas, steps = {}, {}
    for before in files:
        after = out / part.name / before.name
        with safe_open(after, framework="pt") as file:
            for module in weights.modules:
                name = f"{module}.weight"
                if name in file.keys():  # noqa: SIM118
                    merged = file.get_tensor(name)
                    steps[module] = merged.abs().max().item() * torch.finfo(merged.dtype).eps
                    deltas[module] = lambda a=after, b=before, n=name: _weight(a, n) - _weight(b, n)
    return deltas, steps.get


def _weight(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).float()


def _denoiser_files(base: Path) -> tuple[Path, list[Path]]:
    """The denoiser's folder, and its weights in it."""
    part = base / ("transformer" if (base / "transformer").is_dir() else "unet")
    if files := sorted(part.glob("*.safetensors")):
        return part, files
    raise ConfigError(f"base: {str(part)!r} has no .safetensors file; diffusers' save_pretrained writes one")
