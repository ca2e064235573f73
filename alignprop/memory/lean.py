"""Frozen layers that keep for the backward pass only what the gradient of their input needs.

torch keeps what any gradient of a layer might need. If the weights are frozen, most of that is never read, or is cheap
to recompute from something that is kept anyway. The lean layers keep:

    convolution              nothing, because the gradient of its input needs only its weight
    SiLU after a GroupNorm   the input of the GroupNorm, which is kept anyway; the input of the SiLU is recomputed
    LoRA after a LayerNorm   the input of the LayerNorm, which is kept anyway; the input of the LoRA is recomputed
    LoRA elsewhere           its input in the input's dtype, not in float32
    GEGLU                    the projection that it splits, but not the factors that it multiplies
    RMSNorm                  its input in the input's dtype, not in float32

Outputs are the same to the bit. Gradients differ only by the order of sums. The exception is a LoRA on activations of
half precision: in each call, with or without gradient, its float32 factors are rounded to the dtype of the
activations. The gradients of the factors are summed in float32.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alignprop.models.packed import FrozenConv2d


def make_lean(module: nn.Module) -> None:
    """Makes the layers of `module` lean, in place.

    Its adapter must have been added before, because layers that are added later stay plain. Names and weights do not
    change. Each call decides what the layer keeps. It keeps what torch keeps if its weights are trained at that time,
    or if it runs without gradient, under autocast or under torch.compile.
    """
    from diffusers.models.activations import GEGLU
    from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm, SD35AdaLayerNormZeroX
    from peft.tuners.lora import Linear as LoraLinear

    forwards = {
        nn.Conv2d: _conv2d,
        nn.GroupNorm: _norm,
        nn.LayerNorm: _norm,
        AdaLayerNormZero: _ada_layer_norm,
        AdaLayerNormZeroSingle: _ada_layer_norm,
        SD35AdaLayerNormZeroX: _ada_layer_norm,
        nn.RMSNorm: _rms_norm,
        RMSNorm: _rms_norm,
        nn.SiLU: _silu,
        GEGLU: _geglu,
        LoraLinear: _lora_linear,
    }
    for layer in module.modules():
        if type(layer) in forwards and "forward" not in vars(layer):
            layer.forward = MethodType(forwards[type(layer)], layer)


def _keeps_less(x: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    """Says whether a layer with these weights may keep less than torch does in this call."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # torch.compile itself chooses what to keep
        return False
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return not autocast and not any(weight is not None and weight.requires_grad for weight in weights)


# ---- convolutions


def _conv2d(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    unusual = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    if unusual or not _keeps_less(x, layer.weight, layer.bias):
        return nn.Conv2d.forward(layer, x)
    return FrozenConv2d.apply(x, layer)


# ---- norms, whose output can be recomputed


def _norm(layer: nn.GroupNorm | nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    norm = partial(type(layer).forward, layer)
    if not _keeps_less(x, layer.weight, layer.bias):
        return norm(x)
    if isinstance(layer, nn.GroupNorm) and not x.is_cpu:
        x = x.contiguous()  # torch makes this copy too, and keeps it
    return _with_recipe(norm(x), norm, x)


def _ada_layer_norm(layer, x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, ...]:
    """Calls a diffusers layer that returns x normalised and modulated in one or two ways, and later modulations."""
    norm = partial(type(layer).forward, layer)
    outputs = norm(x, *args, **kwargs)
    if _keeps_less(x, *layer.linear.parameters()):
        for i, y in enumerate(outputs):
            if y.shape == x.shape:
                _with_recipe(y, lambda x, i=i: norm(x, *args, **kwargs)[i], x)
    return outputs


def _with_recipe(y: torch.Tensor, norm: Callable, x: torch.Tensor) -> torch.Tensor:
    """Notes on the tensor y that it is norm(x). The note stays on this tensor object only."""
    y.recipe = (norm, x)
    return y


def _recipe(y: torch.Tensor) -> tuple[Callable, torch.Tensor] | None:
    return getattr(y, "recipe", None) if y._version == 0 else None  # not if it has been changed in place


# ---- layers that read the output of a norm


def _silu(layer: nn.SiLU, x: torch.Tensor) -> torch.Tensor:
    recipe = _keeps_less(x) and _recipe(x)
    return _Silu.apply(x, *recipe) if recipe else nn.SiLU.forward(layer, x)


class _Silu(Function):
    @staticmethod
    def forward(ctx, x, norm, source):
        ctx.norm = norm
        ctx.save_for_backward(source)
        return F.silu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x = ctx.norm(*ctx.saved_tensors)
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=x), None, None


def _lora_linear(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Computes peft's `lora.Linear` in the dtype of x, if it has a single, ordinary adapter, as it mostly has."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if (
        name not in layer.lora_A
        or layer.disable_adapters
        or layer.merged
        or name in layer.lora_variant  # DoRA and others
        or layer.lora_bias[name]
        or not isinstance(layer.lora_dropout[name], nn.Identity)
        or args
        or kwargs
    ):
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.base_layer(x) + _times(_times(x, a), b) * layer.scaling[name]


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if not _keeps_less(x):
        return F.linear(x, factor.to(x.dtype))
    return _Times.apply(x, factor, *(_recipe(x) or (None, x)))


class _Times(Function):
    @staticmethod
    def forward(ctx, x, factor, norm, source):
        ctx.norm = norm
        ctx.save_for_backward(source, factor)
        return F.linear(x, factor.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        source, factor = ctx.saved_tensors
        grad_x = grad @ factor.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_factor = None
        if ctx.needs_input_grad[1]:
            x = ctx.norm(source) if ctx.norm else source
            # This product is in float32, as in peft. The gradients of the two branches of guidance nearly cancel, but
            # rounding errors would not.
            grad_factor = grad.flatten(0, -2).to(factor.dtype).T @ x.flatten(0, -2).to(factor.dtype)
        return grad_x, grad_factor, None, None


# ---- other layers


def _geglu(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    if args or kwargs or not _keeps_less(x):
        return type(layer).forward(layer, x, *args, **kwargs)
    return _Geglu.apply(layer.proj(x))


class _Geglu(Function):
    @staticmethod
    def forward(ctx, projected):
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return value * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        value, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)


def _rms_norm(layer, x: torch.Tensor) -> torch.Tensor:
    forward = partial(type(layer).forward, layer)
    return _Recomputed.apply(x, forward) if _keeps_less(x, *layer.parameters()) else forward(x)


class _Recomputed(Function):
    """Computes function(x), and all of it again in the backward pass."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return torch.autograd.grad(y, x, grad)[0], None
