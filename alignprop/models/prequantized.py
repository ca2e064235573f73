"""Takes over the layers of networks whose files are quantised already, so that they are packed layers like all others.

diffusers and transformers load such files into layers of bitsandbytes (NF4 and int8) and of diffusers (GGUF). Those
layers keep their weight unpacked for the backward pass, or cannot compute on every device.
"""

import torch
from torch import nn

from alignprop.models.formats import GGUF, GROUP, NF4, PerChannel
from alignprop.models.packed import is_packed, replace_weight
from alignprop.settings.errors import ConfigError


def adopt_parts(pipeline, dtype: torch.dtype, full: bool) -> None:
    """Turns the quantised layers of all parts of a loaded pipeline into packed layers.

    Args:
        pipeline: the pipeline.
        dtype: the precision in which the layers compute.
        full: whether the denoiser's weights are trained.

    Raises:
        ConfigError: layers have a format that packed layers do not have, or weights to train are quantised.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            adopt(part, dtype, "pretrained.model")
            if full and name in ("unet", "transformer") and is_packed(part):
                raise ConfigError(
                    "use_lora = False: the weights of the denoiser are quantised, so only a LoRA can be trained"
                )


def adopt(network: nn.Module, dtype: torch.dtype, field: str) -> None:
    """Replaces the quantised layers of other libraries by packed layers (packed.py) with the same weights.

    Args:
        network: a loaded network.
        dtype: the precision in which the layers compute.
        field: the field that named the network's files.

    Raises:
        ConfigError: the network has layers in a format that packed layers do not have.
    """
    for name, layer in list(network.named_modules()):
        kind = type(layer).__name__
        if kind == "GGUFLinear":
            _adopt_gguf(layer, dtype)
        elif kind == "Linear4bit":
            _adopt_4bit(layer, dtype, field)
        elif kind == "Linear8bitLt":
            _adopt_8bit(layer, dtype)
        elif type(layer).__module__.startswith("optimum") or _is_torchao(getattr(layer, "weight", None)):
            raise ConfigError(f"{field}: layer {name!r} is quantised by another library; give the unquantised weights")
    for layer in network.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if type(parameter).__name__ == "GGUFParameter":  # of a norm or an embedding
                setattr(layer, name, nn.Parameter(_unpacked(parameter).to(dtype), requires_grad=False))
    if getattr(network, "hf_quantizer", None) is not None:  # else it refuses to be moved
        network.hf_quantizer, network.is_quantized = None, False


def _adopt_gguf(layer: nn.Linear, dtype: torch.dtype) -> None:
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions

    weight = layer.weight
    if layer.bias is not None:
        layer.bias = nn.Parameter(_unpacked(layer.bias).to(dtype), requires_grad=False)
    if isinstance(weight, GGUFParameter) and weight.quant_type in dequantize_functions:
        packed = {"values": weight.as_tensor().detach()}
        _replace(layer, GGUF(int(weight.quant_type)), packed, torch.Size(weight.quant_shape), dtype)
    else:
        layer.__class__ = nn.Linear
        layer.weight = nn.Parameter(_unpacked(weight).to(dtype), requires_grad=False)


def _unpacked(parameter: torch.Tensor) -> torch.Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(parameter.detach()).as_subclass(torch.Tensor)


def _adopt_4bit(layer: nn.Linear, dtype: torch.dtype, field: str) -> None:
    state = layer.weight.quant_state
    if state.quant_type != "nf4" or state.blocksize != GROUP or (state.nested and state.state2.blocksize != 256):
        found = f"{state.quant_type} in blocks of {state.blocksize}"
        raise ConfigError(f"{field}: bitsandbytes' 4-bit weights must be nf4 in blocks of {GROUP}, and are {found}")
    packed = {"values": layer.weight.data, "absmax": state.absmax}
    if state.nested:
        packed |= {"scale": state.state2.absmax, "offset": state.offset}
    _replace(layer, NF4(), packed, state.shape, dtype)


def _adopt_8bit(layer: nn.Linear, dtype: torch.dtype) -> None:
    largest = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # the second after a first call
    packed = {"values": layer.weight.data, "scale": largest[:, None].float() / 127}
    _replace(layer, PerChannel(torch.int8, 127), packed, layer.weight.shape, dtype)


def _replace(layer: nn.Linear, fmt, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
    layer.__class__ = nn.Linear
    replace_weight(layer, fmt, packed, shape, dtype)


def _is_torchao(weight) -> bool:
    kinds = (type(weight), type(getattr(weight, "data", None)))
    return any(kind.__module__.startswith("torchao") for kind in kinds)
