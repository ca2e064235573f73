"""LoRAs in kohya's format: how they are written and read.

A layer has three tensors, `<name>.lora_down.weight` [rank, in, …], `<name>.lora_up.weight` [out, rank, …] and the
number `<name>.alpha`, and ΔW = alpha / rank · up @ down. The names are in lora/kohya_names.py.
"""

import re

import torch

from alignprop.lora.kohya_names import PREFIX, find_format, known_layers, plain_layers
from alignprop.lora.networks import layer
from alignprop.settings.errors import ConfigError

_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")


def is_kohya(names) -> bool:
    """Whether a file with tensors of these names is in the format."""
    return any(re.match(f"{PREFIX}|lora_te\\d?_", name) for name in names)


def pack(tensors: dict[str, torch.Tensor], scale: float, model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header of a file in kohya's format.

    Args:
        tensors: "<module>.lora_A.weight" and "<module>.lora_B.weight" of all modules (lora/networks.py).
        scale: ΔW = scale · B @ A.
        model: that the modules are of; on any device.

    Raises:
        ConfigError: some of the modules have no name that every tool knows.
    """
    names = known_layers(model)
    known = {module for modules in names.values() for module in modules}
    adapted = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    if unknown := sorted(adapted - known):
        raise ConfigError(
            f"format = 'kohya': {len(unknown)} of the {len(adapted)} adapted layers have no name that diffusers reads, "
            f"for example {unknown[0]!r}; use 'diffusers'"
        )
    layers = {name: _stack(modules, tensors, model) for name, modules in names.items() if adapted & {*modules}}
    # One for all layers: of the attentions' own, where they differ, diffusers takes no notice.
    alpha = max(len(down) for down, _ in layers.values())
    file = {}
    for name, (down, up) in layers.items():
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * (scale * len(down) / alpha)}
        file[f"{name}.alpha"] = torch.tensor(float(alpha))
    size = {"ss_network_dim": str(alpha), "ss_network_alpha": str(float(alpha)), "ss_network_args": "{}"}
    return file, find_format(model.denoiser).header(model.denoiser) | size


def unpack(file: dict[str, torch.Tensor], model) -> dict[str, torch.Tensor]:
    """The inverse of `pack`, with the scale in the B; also reads any denoiser's own names with underscores.

    Args:
        file: the tensors of a file in kohya's format, with an alpha for each layer or none, which means its rank.

    Raises:
        ConfigError: a tensor that is not of a LoRA of this model, or a layer without its other factor.
    """
    names = plain_layers(model.denoiser) | known_layers(model)
    tensors, unread = {}, dict(file)
    for name, modules in names.items():
        down, up, alpha = (unread.get(f"{name}.{suffix}") for suffix in _SUFFIXES)
        if down is None or up is None:
            continue
        for suffix in _SUFFIXES:
            unread.pop(f"{name}.{suffix}", None)
        scale = 1.0 if alpha is None else alpha.item() / len(down)
        sizes = [layer(model, module).weight.shape[0] for module in modules]
        if sum(sizes) != len(up):
            raise ConfigError(f"LoRA: {name!r} is {sum(sizes)} wide in this model, {len(up)} in the file")
        for module, rows in zip(modules, up.split(sizes), strict=True):
            # A stack's factors are zero where the outputs are another module's.
            used = torch.ones(len(down), dtype=torch.bool) if len(modules) == 1 else rows.flatten(1).any(0)
            if used.any():
                tensors[f"{module}.lora_A.weight"] = down[used]
                tensors[f"{module}.lora_B.weight"] = scale * rows[:, used]
    if unread:
        raise ConfigError(
            f"LoRA: {len(file) - len(unread)} of its {len(file)} keys are factors of this model's layers in kohya's "
            f"format, {len(unread)} are not, for example {min(unread)!r}; other LoRAs are not supported"
        )
    return tensors


def _stack(modules, tensors, model) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer whose ΔW are those of the modules, one below the other; a module without one has zeros.

    [ΔW1; ΔW2] = blockdiag(B1, B2) @ [A1; A2]. Blocks of one size for every module let a reader take it apart again.
    """
    pairs = [(tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")) for module in modules]
    if len(pairs) == 1:
        return pairs[0]
    like = next(down for down, _ in pairs if down is not None)
    widths = [layer(model, module).weight.shape[0] for module in modules]
    downs = [torch.zeros_like(like) if down is None else down for down, _ in pairs]
    ups = [like.new_zeros(width, len(like)) if up is None else up for (_, up), width in zip(pairs, widths, strict=True)]
    return torch.cat(downs), torch.block_diag(*ups)
