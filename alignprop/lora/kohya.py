"""Writes LoRAs in kohya's format; lora/layouts.py reads them.

A layer has three tensors: `<name>.lora_down.weight` [rank, in, …], `<name>.lora_up.weight` [out, rank, …] and the
number `<name>.alpha`. Its ΔW is alpha / rank · up @ down. The names are in lora/kohya_names.py.
"""

import torch

from alignprop.lora.kohya_names import find_format, known_layers
from alignprop.lora.networks import layer
from alignprop.settings.errors import ConfigError


def pack(tensors: dict[str, torch.Tensor], scale: float, model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors and the header of a file in kohya's format.

    Args:
        tensors: "<module>.lora_A.weight" and "<module>.lora_B.weight" of all modules (lora/networks.py).
        scale: ΔW = scale · B @ A.
        model: the model that the LoRA is for, on any device.

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
    # All layers get the same alpha, because diffusers ignores the attention layers' own alphas if they differ.
    alpha = max(len(down) for down, _ in layers.values())
    file = {}
    for name, (down, up) in layers.items():
        file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * (scale * len(down) / alpha)}
        file[f"{name}.alpha"] = torch.tensor(float(alpha))
    size = {"ss_network_dim": str(alpha), "ss_network_alpha": str(float(alpha)), "ss_network_args": "{}"}
    return file, find_format(model.denoiser).header(model.denoiser) | size


def _stack(modules, tensors, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B of one layer that stacks the ΔW of several modules; the ΔW of a module without a LoRA is zero.

    [ΔW1; ΔW2] = blockdiag(B1, B2) @ [A1; A2]. The blocks of all modules have the same size, so that a reader can
    split the layer again.
    """
    pairs = [(tensors.get(f"{module}.lora_A.weight"), tensors.get(f"{module}.lora_B.weight")) for module in modules]
    if len(pairs) == 1:
        return pairs[0]
    like = next(down for down, _ in pairs if down is not None)
    widths = [layer(model, module).weight.shape[0] for module in modules]
    downs = [torch.zeros_like(like) if down is None else down for down, _ in pairs]
    ups = [like.new_zeros(width, len(like)) if up is None else up for (_, up), width in zip(pairs, widths, strict=True)]
    return torch.cat(downs), torch.block_diag(*ups)
