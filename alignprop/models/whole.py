"""Checks that all weights of a model's parts were loaded from files, and sets the precision of the parts."""

from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel


class MissingWeights(ValueError):
    """Raised if no file holds some of a network's weights."""

    def __init__(self, network: str, names):
        names = sorted(names)
        super().__init__(f"the files lack {len(names)} of the weights of its {network}, such as {names[0]!r}")


@contextmanager
def whole_parts():
    """Makes `from_pretrained` refuse files that lack some of a network's weights, inside the `with` block.

    Without it diffusers and transformers draw the missing weights at random and print a warning.

    Raises:
        MissingWeights: `from_pretrained` raises it.
    """
    before = {base: base.__dict__["from_pretrained"] for base in (ModelMixin, PreTrainedModel)}
    for base, method in before.items():
        base.from_pretrained = classmethod(_checked(method.__func__))
    try:
        yield
    finally:
        for base, method in before.items():
            base.from_pretrained = method


def _checked(load):
    def from_pretrained(cls, *args, **options):
        asked = options.pop("output_loading_info", False)
        module, info = load(cls, *args, output_loading_info=True, **options)
        if info["missing_keys"]:
            raise MissingWeights(cls.__name__, info["missing_keys"])
        return (module, info) if asked else module

    return from_pretrained


def refuse_gaps(pipeline) -> None:
    """Refuses a pipeline with weights that were not loaded, which are still on the meta device.

    Raises:
        MissingWeights: a network of the pipeline has such weights.
    """
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        if empty := [name for name, parameter in network.named_parameters() if parameter.is_meta]:
            raise MissingWeights(type(network).__name__, empty)


def set_precision(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Converts a network to `dtype`, except packed weights and the layers that its class keeps in float32.

    T5, for example, has layers that overflow in float16.
    """
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        parts = name.split(".")
        if tensor.is_floating_point() and not parts[-1].startswith("packed_") and not set(parts) & set(kept):
            tensor.data = tensor.data.to(dtype)
