"""Parts of a model as they are loaded: all their weights from a file, in the precision that they are made for."""

from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel


class MissingWeights(ValueError):
    """Some weights of a network are in no file."""

    def __init__(self, network: str, names):
        names = sorted(names)
        super().__init__(f"the files lack {len(names)} of the weights of its {network}, such as {names[0]!r}")


@contextmanager
def whole_parts():
    """Within it `from_pretrained` refuses files without some of a network's weights.

    diffusers and transformers would draw those at random and say so in a warning.

    Raises:
        MissingWeights: by `from_pretrained`.
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
    """
    Raises:
        MissingWeights: a network of the pipeline has places for weights that nothing was loaded into.
    """
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for network in networks:
        if empty := [name for name, parameter in network.named_parameters() if parameter.is_meta]:
            raise MissingWeights(type(network).__name__, empty)


def set_precision(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Computes in `dtype` from now on, but for the layers that its class keeps in float32: T5's overflow in float16."""
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not any(part in kept for part in name.split(".")):
            tensor.data = tensor.data.to(dtype)
