"""A LoRA merged into its base model: W + ΔW in float32, written as a diffusers pipeline in the base's own precision.

Weight files are rewritten one by one, so that the model need not fit into memory at once.
"""

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alignprop.lora.factors import LoraWeights
from alignprop.models.base import split_name
from alignprop.publish.verification import Deltas
from alignprop.settings.errors import ConfigError

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
    """Writes the pipeline in the folder `base`, with the LoRA in its weights, to the new folder `out`.

    Raises:
        ConfigError: the base has no such weights in safetensors files.
    """
    files = _adapted_files(weights, base)
    out.mkdir()
    shutil.copy(base / INDEX, out)
    for folder in (base / name for name in json.loads((base / INDEX).read_text(encoding="utf-8"))):
        if folder.is_dir():
            # Weights in another format would still be without the LoRA.
            adapted = any(path.parent == folder for path in files)
            unmerged = shutil.ignore_patterns("*.safetensors", "*.bin", "*.msgpack") if adapted else None
            shutil.copytree(folder, out / folder.name, ignore=unmerged)
    absent = {*weights.modules}
    for path, modules in files.items():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        for module in modules:
            if (name := _stored_name(module, tensors)) is not None:
                tensors[name] = (tensors[name].float() + weights.delta(module)).to(tensors[name].dtype)
                absent.discard(module)
        save_file(tensors, out / path.relative_to(base), header)
    if absent:
        raise ConfigError(f"the weight files in {str(base)!r} have no {min(absent) + '.weight'!r}; are they whole?")


def merged_deltas(weights: LoraWeights, base: Path, out: Path) -> tuple[Deltas, Callable[[str], float]]:
    """W' - W of every adapted layer, as written, and how far its rounding may change it; see `verification.compare`."""
    deltas, steps = {}, {}
    for before, modules in _adapted_files(weights, base).items():
        after = out / before.relative_to(base)
        with safe_open(after, framework="pt") as file:
            for module in modules:
                if (name := _stored_name(module, file.keys())) is not None:
                    merged = file.get_tensor(name)
                    steps[module] = merged.abs().max().item() * torch.finfo(merged.dtype).eps
                    deltas[module] = lambda a=after, b=before, n=name: _weight(a, n) - _weight(b, n)
    return deltas, steps.get


def _weight(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).float()


def _adapted_files(weights: LoraWeights, base: Path) -> dict[Path, list[str]]:
    """The weight files of the pipeline's parts that the LoRA adapts, and the modules of that part."""
    denoiser = base / ("transformer" if (base / "transformer").is_dir() else "unet")
    adapted: dict[Path, list[str]] = {}
    for module in weights.modules:
        encoder, _ = split_name(module)
        adapted.setdefault(base / encoder if encoder else denoiser, []).append(module)
    files = {path: modules for part, modules in adapted.items() for path in sorted(part.glob("*.safetensors"))}
    for part in adapted:
        if not any(path.parent == part for path in files):
            raise ConfigError(f"base: {str(part)!r} has no .safetensors file; diffusers' save_pretrained writes one")
    return files


def _stored_name(module: str, names: Collection[str]) -> str | None:
    """What a weight file calls the weight of a module (lora/networks.py); None where it is not in it."""
    _, inner = split_name(module)
    # Versions of transformers differ in what they call the layers of a text encoder.
    candidates = (f"{inner}.weight", f"{inner.removeprefix('text_model.')}.weight")
    return next((name for name in candidates if name in names), None)
