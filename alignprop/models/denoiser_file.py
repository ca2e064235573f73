"""Loads a denoiser from a place of its own, such as a quantised file of another publisher than the pipeline's."""

import os
from pathlib import Path

import diffusers
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from alignprop.models.formats import check_packages
from alignprop.models.prequantized import adopt

FIELD = "pretrained.denoiser"
FILES = (".gguf", ".safetensors", ".ckpt")


def load_denoiser(name: str, kind: str, part: str, config: str, dtype: torch.dtype) -> torch.nn.Module:
    """Loads a denoiser. Weights in GGUF's and bitsandbytes' formats stay packed (packed.py); fp8 becomes `dtype`.

    Args:
        name: a file with the weights of the denoiser alone, or the folder or hub name of a denoiser or a pipeline. A
            file on the hub is "user/repository/file.gguf".
        kind: the name of its diffusers class.
        part: the name of the denoiser in its pipeline, "unet" or "transformer".
        config: the folder or hub name of the pipeline, which has the denoiser's configuration.
        dtype: the precision of weights that are not quantised.

    Raises:
        Exception: whatever diffusers, the hub's client and files raise.
    """
    denoiser = _load(getattr(diffusers, kind), name, part, config, dtype)
    adopt(denoiser, dtype, FIELD)
    return denoiser


def _load(cls: type, name: str, part: str, config: str, dtype: torch.dtype) -> torch.nn.Module:
    if not name.endswith(FILES):
        inner = {"subfolder": part} if _is_pipeline(name) else {}
        return cls.from_pretrained(name, torch_dtype=dtype, **inner)
    if not os.path.exists(name) and name.count("/") >= 2:
        user, repository, file = name.split("/", 2)
        name = hf_hub_download(f"{user}/{repository}", file)
    options = {"config": config, "subfolder": part, "torch_dtype": dtype}
    if name.endswith(".gguf"):
        check_packages("gguf", FIELD)
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
        return cls.from_single_file(name, **options)
    return cls.from_single_file(_scaled(name, dtype) or name, **options)


def _is_pipeline(name: str) -> bool:
    if os.path.isdir(name):
        return Path(name, "model_index.json").is_file()
    try:
        hf_hub_download(name, "model_index.json")
        return True
    except Exception:  # the hub's client raises many kinds of errors; loading will say what is wrong
        return False


def _scaled(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Returns the weights of a file whose weights in 8 bits have a scale beside them, as ComfyUI writes it.

    None: the file has no such scales. Scales of activations are not needed, because the weights are unpacked.
    """
    if not path.endswith(".safetensors"):
        return None
    endings = (".scale_weight", ".weight_scale")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        scales = {n.rpartition(".")[0] + ".weight": n for n in names if n.endswith(endings)}
        if not scales:
            return None
        extra = {*scales.values(), *(n for n in names if n.endswith((".scale_input", ".input_scale", "scaled_fp8")))}
        weights = {name: file.get_tensor(name) for name in sorted(names - extra)}
        for name, scale in scales.items():
            factor = file.get_tensor(scale).float()
            if factor.dim() == 1 and factor.numel() > 1:  # one for each output channel
                factor = factor.view(-1, *[1] * (weights[name].dim() - 1))
            weights[name] = (weights[name].float() * factor).to(dtype)
    return weights
