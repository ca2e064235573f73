"""Reads an export again, with diffusers if possible, and compares its ΔW with the original."""

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
"""{layer's name: a function that returns its ΔW, float32 in the weight's shape}. All at once would be too large."""


@dataclass(frozen=True)
class Check:
    """The result of comparing an export with its original.

    Attributes:
        layers: the number of layers that the LoRA adapts.
        checked: the number of these layers that were found and compared.
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
    """Compares every ΔW that was read with the ΔW of `weights`, which is zero for layers that it does not adapt.

    Args:
        weights: the original LoRA.
        deltas: the ΔW of the layers as read.
        allowed: returns the largest difference that rounding can explain, by the layer's name.

    Raises:
        ConfigError: a layer is missing, unless its ΔW is zero, or differs by more.
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
        if not error <= allowed(module):  # `not` also covers an error that is NaN.
            wrong[module] = error
    if lost or wrong:
        raise ConfigError(
            f"not exported, because it would be read differently: of {len(weights.modules)} layers {len(lost)} would "
            f"be lost and {len(wrong)} change by up to {max(wrong.values(), default=0):.1e}, for example "
            f"{[*lost, *wrong][0]!r}"
        )
    return Check(len(weights.modules), len({*weights.modules} & {*deltas}), difference, largest)


def rounding(weights: LoraWeights, dtype: torch.dtype) -> Callable[[str], float]:
    """Returns the differences that `compare` allows for a LoRA with its factors rounded to `dtype`.

    A reader may round one of the factors again, and sums their products in float32.
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
    """Returns the ΔW that diffusers reads from a file.

    Args:
        path: the LoRA file.
        model: the model that the LoRA is loaded into.

    Raises:
        ConfigError: diffusers cannot read the file.
    """
    from peft.tuners.lora import LoraLayer

    try:
        pipeline_around(model).load_lora_weights(path)
    except Exception as error:  # The readers of diffusers raise many kinds of errors.
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(
            f"not exported, diffusers cannot read it in this format ({reason}); it may read 'diffusers' or 'merged'"
        ) from error
    # The layers are converted to float32, because peft rounds the product once more in half precision.
    return {
        name_in_file(model, part, name): lambda layer=layer: layer.float().get_delta_weight(layer.active_adapters[0])
        for part, module in adaptable_networks(model).items()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def weightless(facts: dict) -> Model:
    """Returns a model to load a LoRA into, which takes almost no memory.

    Each weight of its adaptable networks has its shape, but is a single zero in memory. The rest of the model is on
    the meta device. A LoRA in a network on that device would lose its values.

    Args:
        facts: the result of `find_config` (models/configs.py).
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
    """Returns a diffusers pipeline with only the networks that a LoRA can adapt, which is enough to load a LoRA."""
    cls = model.pipeline_class()
    parameters = inspect.signature(cls.__init__).parameters.values()
    having = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    return cls(**having | model.lora_encoders | {"unet" if "unet" in having else "transformer": model.denoiser})
