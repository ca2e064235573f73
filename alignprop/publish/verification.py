"""What was exported is read again, by others' code where there is some, and its ΔW held against the original."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from alignprop.lora.factors import LoraWeights
from alignprop.lora.networks import adaptable_networks, name_in_file
from alignprop.models.base import Model
from alignprop.models.skeleton import skeleton
from alignprop.settings.errors import ConfigError

Deltas = dict[str, Callable[[], torch.Tensor]]
"""How to get the ΔW of a layer, float32 in the shape of its weight, by the layer's name: all at once are too many."""


@dataclass(frozen=True)
class Check:
    """What reading again found.

    Attributes:
        layers: that the LoRA adapts.
        checked: how many of them were found and compared.
        difference: the largest |ΔW as read - ΔW|.
        largest: the largest |ΔW|.
    """

    layers: int
    checked: int
    difference: float
    largest: float

    def __str__(self):
        return (
            f"{self.checked} of {self.layers} layers read again, largest difference of ΔW {self.difference:.1e} "
            f"(ΔW up to {self.largest:.1e})"
        )


def compare(weights: LoraWeights, deltas: Deltas, allowed: Callable[[str], float]) -> Check:
    """Holds every ΔW that was read against that of `weights`; of layers without one, against zero.

    Args:
        allowed: the largest difference that rounding explains, of the layer with that name.

    Raises:
        ConfigError: a layer is missing or differs by more.
    """
    lost, wrong, difference, largest = [], {}, 0.0, 0.0
    for module in sorted({*weights.modules, *deltas}):
        expected = weights.delta(module) if module in weights.modules else torch.zeros(())
        largest = max(largest, expected.abs().max().item())
        if module not in deltas:
            lost += [module] if expected.any() else []
            continue
        error = (deltas[module]() - expected).abs().max().item()
        difference = max(difference, error)
        if not error <= allowed(module):  # also where it is not a number
            wrong[module] = error
    if lost or wrong:
        raise ConfigError(
            f"not exported, because it would not be read as it is: of {len(weights.modules)} layers {len(lost)} would "
            f"be lost and {len(wrong)} change by up to {max(wrong.values(), default=0):.1e}, for example "
            f"{[*lost, *wrong][0]!r}"
        )
    return Check(len(weights.modules), len({*weights.modules} & {*deltas}), difference, largest)


def rounding(weights: LoraWeights, dtype: torch.dtype) -> Callable[[str], float]:
    """What `compare` allows where both factors were rounded to `dtype`, a reader may round one of them again, and
    summed their products in float32.
    """
    magnitudes = LoraWeights({name: tensor.abs() for name, tensor in weights.tensors.items()}, abs(weights.scale))

    def allowed(module: str) -> float:
        if module not in weights.modules:
            return 0.0
        share = 2 * torch.finfo(dtype).eps + weights.rank(module) * torch.finfo(torch.float32).eps
        return share * magnitudes.delta(module).max().item()

    return allowed


def own_deltas(weights: LoraWeights) -> Deltas:
    return {module: lambda module=module: weights.delta(module) for module in weights.modules}


def diffusers_deltas(path: Path, model: Model) -> Deltas:
    """What diffusers makes of a file.

    Args:
        model: the LoRA is loaded into it.

    Raises:
        ConfigError: diffusers cannot read it.
    """
    from peft.tuners.lora import LoraLayer

    try:
        pipeline_around(model).load_lora_weights(path)
    except Exception as error:  # its readers fail in many ways
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(
            f"not exported, diffusers cannot read it in this format ({reason}); it may read 'diffusers' or 'merged'"
        ) from error
    # In half precision peft would round the product once more.
    return {
        name_in_file(model, part, name): lambda layer=layer: layer.float().get_delta_weight(layer.active_adapters[0])
        for part, module in adaptable_networks(model).items()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def weightless(facts: dict) -> Model:
    """A model of which all that a LoRA can adapt has its shapes, but one and the same zero in memory for every weight.

    On the meta device, where the rest is, a LoRA would lose its values to it.

    Args:
        facts: what `find_config` returns (models/configs.py).
    """
    model = skeleton(facts, torch.float32)
    for module in adaptable_networks(model).values():
        for layer in module.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, torch.nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
            for name, buffer in list(layer.named_buffers(recurse=False)):
                setattr(layer, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def pipeline_around(model: Model):
    """A diffusers pipeline that has what a LoRA can adapt and nothing else, which is enough to load one."""
    cls = model.pipeline_class()
    parameters = inspect.signature(cls.__init__).parameters.values()
    having = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    return cls(**having | model.lora_encoders | {"unet" if "unet" in having else "transformer": model.denoiser})
