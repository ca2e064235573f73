"""LoRA files: diffusers' own `pytorch_lora_weights.safetensors`, and what else is read."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignprop.lora import kohya
from alignprop.lora.factors import LoraWeights
from alignprop.lora.foreign import read_foreign
from alignprop.settings.errors import ConfigError

LORA_FILE = "pytorch_lora_weights.safetensors"
_PAIR = re.compile(r"\.lora_[AB]\.weight$")


def save_lora(model, weights: LoraWeights, folder) -> None:
    """Writes `weights` so that `model.pipeline_class.load_lora_weights(folder)` reads them."""
    model.save_lora(folder, weights.tensors, weights.scale)


def read_lora(path, model=None) -> LoraWeights:
    """Reads an adapter from a file or from the folder that holds `pytorch_lora_weights.safetensors`.

    Also reads the attention-processor keys (`….processor.to_q_lora.down.weight`) of AlignProp's released
    checkpoints, which diffusers' `load_lora_weights` silently ignores, kohya's format (kohya.py), and what else
    diffusers converts for the model's pipeline (foreign.py).

    Args:
        model: that it is for, on any device; what the names of other tools mean depends on it.

    Raises:
        ConfigError: no such file, not a whole safetensors file, no LoRA tensors in it, numbers that are not finite, or
            an alpha per layer in the header of diffusers' format.
    """
    path = Path(path)
    path = path / LORA_FILE if path.is_dir() else path
    raw, metadata = _read_tensors(path)
    if model is not None and kohya.is_kohya(raw):
        return LoraWeights(kohya.unpack(raw, model), 1.0)
    tensors = {_canonical_key(name): tensor for name, tensor in raw.items()}
    if model is not None and raw and any(map(_is_foreign, tensors)):
        raw = tensors = read_foreign(raw, model, repr(str(path)))
    unknown = [name for name in raw if not _PAIR.search(_canonical_key(name))]
    single = [name for name in tensors if _PAIR.search(name) and _partner(name) not in tensors]
    if unknown or single or not raw:
        raise ConfigError(
            f"{str(path)!r}: {len(raw) - len(unknown) - len(single)} of its {len(raw)} keys are pairs of LoRA factors, "
            f"{len(unknown) + len(single)} are not, for example {(unknown + single + ['none at all'])[0]!r}"
        )
    return LoraWeights(tensors, _read_scale(metadata, path))


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors in float32, and the header."""
    if not path.is_file():
        raise ConfigError(f"no LoRA file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        # A pickle (.bin, .pt, .ckpt) could run code, so it is not even tried.
        raise ConfigError(f"{str(path)!r} is not a whole safetensors file: {error}") from error
    check_finite(tensors, repr(str(path)))
    return tensors, metadata


def check_finite(tensors: dict[str, torch.Tensor], source: str) -> None:
    """
    Args:
        source: what the tensors are of, as a message begins.

    Raises:
        ConfigError: some are not finite.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ConfigError(f"{source}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity, such as {bad[0]!r}")


def _is_foreign(name: str) -> bool:
    """Whether a tensor's name, made canonical, is still one of another tool's layout."""
    return not _PAIR.search(name) or name.startswith(("diffusion_model.", "double_blocks.", "single_blocks."))


def _partner(name: str) -> str:
    """The other factor's key."""
    a, b = "lora_A.weight", "lora_B.weight"
    return name.removesuffix(a) + b if name.endswith(a) else name.removesuffix(b) + a


def _canonical_key(name: str) -> str:
    name = re.sub(r"^(unet|transformer)\.", "", name)
    name = re.sub(r"\.processor\.(to_[qkv])_lora\.", r".\1.lora.", name)
    name = re.sub(r"\.processor\.to_out_lora\.", ".to_out.0.lora.", name)
    if name.startswith("text_encoder"):
        name = re.sub(r"^(text_encoder\w*)\.(?!text_model\.|text_projection\.)", r"\1.text_model.", name)
        name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora.", name).replace(".lora_linear_layer.", ".lora.")
    return name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


def _read_scale(metadata: dict[str, str], path: Path) -> float:
    """alpha / rank as diffusers writes it into a file's header; files without it mean alpha = rank."""
    try:
        packed = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        parts = [name.removesuffix("r") for name in packed.keys() if name.split(".")[-1] == "r"]  # noqa: SIM118
        scales = {packed[f"{part}lora_alpha"] / packed[f"{part}r"] for part in parts} or {1.0}
        patterns = [packed.get(f"{part}{kind}_pattern") for part in parts for kind in ("rank", "alpha")]
    except (ValueError, AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{str(path)!r}: the lora_adapter_metadata in its header is damaged") from error
    if any(patterns) or len(scales) > 1:
        raise ConfigError(f"{str(path)!r}: an alpha / rank of its own for each layer or part is not supported")
    return scales.pop()
