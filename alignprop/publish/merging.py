"""Merges a LoRA into its base model: adds W + ΔW in float32, and writes a diffusers pipeline in the base's precision.

Weight files are rewritten one by one, so that the whole model need not fit into memory.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import make_readable
from alignprop.models.base import split_name
from alignprop.publish.verification import Deltas
from alignprop.settings.errors import ConfigError

INDEX = "model_index.json"


def pipeline_folder(name: str, revision: str | None) -> Path:
    """Returns the folder of a pipeline: `name` itself, or its folder in the Hugging Face cache, downloaded if needed.

    Raises:
        ConfigError: `name` is no folder, and the pipeline cannot be loaded from the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, revision=revision))
    except Exception as error:  # The hub's client raises many kinds of errors.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(f"base = {name!r} could not be loaded: {type(error).__name__}: {reason}") from error


def merge(weights: LoraWeights, base: Path, out: Path) -> None:
    """Writes the pipeline in the folder `base`, with the LoRA in its weights, to the new folder `out`.

    If a part has only the files of a variant, such as "fp16", they get plain names, which every loader finds.

    Raises:
        ConfigError: the base's safetensors files lack some of the weights that the LoRA adapts.
    """
    files = _adapted_files(weights, base)
    out.mkdir()
    shutil.copy(base / INDEX, out)
    for folder in (base / name for name in json.loads((base / INDEX).read_text(encoding="utf-8"))):
        if folder.is_dir():
            # Weights in other formats are not copied, because the LoRA is not merged into them.
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
    for path in sorted(out.glob("*/*")):
        _rename(path, base / path.parent.name)
    make_readable(out)
    if absent:
        raise ConfigError(f"the weight files in {str(base)!r} have no {min(absent) + '.weight'!r}; are they whole?")


def merged_deltas(weights: LoraWeights, base: Path, out: Path) -> tuple[Deltas, Callable[[str], float]]:
    """Returns W' - W of every adapted layer as written, and how much rounding may change it, for `compare`."""
    deltas, steps = {}, {}
    for before, modules in _adapted_files(weights, base).items():
        after = out / before.relative_to(base).with_name(_plain_name(before))
        with safe_open(after, framework="pt") as file:
            for module in modules:
                if (name := _stored_name(module, file.keys())) is not None:
                    merged = file.get_tensor(name)
                    steps[module] = merged.abs().max().item() * torch.finfo(merged.dtype).eps
                    deltas[module] = lambda a=after, b=before, n=name: _weight(a, n) - _weight(b, n)
    return deltas, steps.get


def _rename(path: Path, base: Path) -> None:
    """Gives a written file its plain name; `base` is the folder that the file was made from."""
    if (plain := _plain_name(base / path.name)) == path.name:
        return
    if path.suffix == ".json":  # The index says which shard has which weight.
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {weight: _plain_name(base / shard) for weight, shard in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")
    path.rename(path.with_name(plain))


def _plain_name(path: Path) -> str:
    """Returns a file's name, without the variant in it if the folder has no weights with plain names."""
    names = r"(model|diffusion_pytorch_model)"
    if any(re.fullmatch(rf"{names}(-\d+-of-\d+)?\.safetensors", other.name) for other in path.parent.iterdir()):
        return path.name
    shard = re.sub(rf"^{names}\.\w+?((-\d+-of-\d+)?\.safetensors)$", r"\1\2", path.name)
    return re.sub(rf"^({names}\.safetensors\.index)\.\w+\.json$", r"\1.json", shard)


def _weight(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).float()


def _adapted_files(weights: LoraWeights, base: Path) -> dict[Path, list[str]]:
    """Returns the weight files of the pipeline's parts that the LoRA adapts, each with the part's adapted modules."""
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
    """Returns the name of a module's weight (lora/networks.py) in a weight file; None if the file does not have it."""
    _, inner = split_name(module)
    # Versions of transformers differ in their names for the layers of a text encoder.
    candidates = (f"{inner}.weight", f"{inner.removeprefix('text_model.')}.weight")
    return next((name for name in candidates if name in names), None)
