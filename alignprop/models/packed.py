"""Frozen layers whose weight is kept in fewer bits, or on the host, and is made anew for each call.

A packed layer keeps for the backward pass neither its input nor its weight: the gradient of the input needs only the
weight, which is made again. So one unpacked weight at a time is all that a format adds to the memory of a network.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alignprop.models.formats import GROUP, Format

NARROWEST = 32  # Layers into or out of fewer channels are small and sensitive; they keep their weight as it is.


class Packed:
    """The part that all packed layers share.

    Attributes:
        format: how the weight is kept (formats.py).
        host: the packed tensors, if the layer has given them to a stream. Otherwise they are buffers of the layer.
        weight: the weight, unpacked for each reading.
    """

    format: Format

    def keep(self, fmt: Format, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        """Keeps a weight of this shape and type as these tensors."""
        self.format, self.weight_shape, self.weight_dtype = fmt, shape, dtype
        self.names, self.stream, self.host = tuple(packed), None, None
        for name, tensor in packed.items():
            self.register_buffer(f"packed_{name}", tensor)

    def give_to(self, stream, pinned: bool) -> None:
        """Leaves the packed tensors on the host, from where `stream` brings them (streaming.py)."""
        if self.host is None:
            self.host = {name: self._buffers.pop(f"packed_{name}") for name in self.names}
        if pinned:  # copying from pinned memory is several times faster, and runs beside the computation
            self.host = {name: t if t.is_pinned() else t.cpu().pin_memory() for name, t in self.host.items()}
        self.stream = stream

    @property
    def weight(self) -> torch.Tensor:
        if self.stream is None:
            return self.weight_now()
        on_device = {name: tensor.to(self.stream.device) for name, tensor in self.host.items()}
        return self.format.unpack(on_device, self.weight_shape, self.weight_dtype)

    def packed_now(self) -> dict[str, torch.Tensor]:
        """Returns the packed tensors for one operation at once. Their memory may then have those of another layer."""
        if self.stream is None:
            return {name: self._buffers[f"packed_{name}"] for name in self.names}
        return self.stream.fetch(self)

    def weight_now(self) -> torch.Tensor:
        """Returns the weight for one operation at once. Its memory may then have the weight of another layer."""
        return self.format.unpack(self.packed_now(), self.weight_shape, self.weight_dtype)


class PackedLinear(Packed, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return F.linear(x, self.weight_now(), self.bias)
        return _FrozenLinear.apply(x, self)


class PackedConv2d(Packed, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._conv_forward(x, self.weight_now(), self.bias)
        return FrozenConv2d.apply(x, self)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight_now(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.layer.weight_now(), None


class FrozenConv2d(Function):
    """A convolution that keeps nothing, and takes the weight from the layer again for the gradient of its input."""

    @staticmethod
    def forward(ctx, x, layer):
        # The weight is not saved by `save_for_backward`, because a checkpoint recomputes everything before the last
        # tensor that is saved so. With this weight it would recompute the convolution.
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, _weight_of(layer), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        layer, weight = ctx.layer, _weight_of(ctx.layer)
        stride, padding, dilation = layer.stride, layer.padding, layer.dilation
        # A transposed convolution computes this gradient. In cuDNN it is the same kernel, in the layout of `grad` and
        # the weight. `aten.convolution_backward` needs an input only for its shape, but copies it on a CPU.
        sizes = zip(ctx.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        left_over = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sizes]
        return F.conv_transpose2d(grad, weight, None, stride, padding, left_over, layer.groups, dilation), None


def _weight_of(layer: nn.Conv2d) -> torch.Tensor:
    return layer.weight_now() if isinstance(layer, Packed) else layer.weight


KINDS: dict[type, type] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def packable(network: nn.Module) -> list[nn.Module]:
    """Returns the layers of a network whose weight can be packed: all but small, unusual and trained ones."""
    return [layer for name, layer in network.named_modules() if "lora_" not in name and _can_pack(layer)]


def _can_pack(layer: nn.Module) -> bool:
    if type(layer) not in KINDS or hasattr(layer, "_hf_hook"):  # accelerate has changed its forward
        return False
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    weight = layer.weight
    if weight.requires_grad or not weight.is_floating_point():
        return False
    return min(weight.shape[:2]) >= NARROWEST and weight.numel() % GROUP == 0


def is_packed(network: nn.Module) -> bool:
    """Says whether a network has a packed layer."""
    return any(isinstance(layer, Packed) for layer in network.modules())


@torch.no_grad()
def pack(layers: Iterable[nn.Module], fmt: Format, device: torch.device | None = None) -> None:
    """Replaces the frozen weight of each layer by its packed tensors, in place.

    Args:
        layers: some of those that `packable` returns.
        fmt: the format.
        device: where to compute the packed tensors. They return to the device of the weight. None is that device.
    """
    for layer in layers:
        weight = layer._parameters.pop("weight").detach()
        packed = _pack_meta(fmt, weight.shape, weight.dtype) if weight.is_meta else fmt.pack(weight.to(device))
        packed = {name: tensor.to(weight.device) for name, tensor in packed.items()}
        replace_weight(layer, fmt, packed, weight.shape, weight.dtype)


def _pack_meta(fmt: Format, shape: torch.Size, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns tensors without data like those that a weight is packed into."""
    return {name: torch.empty_like(tensor) for name, tensor in _packed_likeness(fmt, shape, dtype).items()}


@functools.cache  # a planner packs the same weights again and again, and operators on meta tensors are slow
def _packed_likeness(fmt: Format, shape: torch.Size, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return fmt.pack(torch.empty(shape, dtype=dtype, device="meta"))


def replace_weight(
    layer: nn.Module, fmt: Format, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype
) -> None:
    """Gives a layer a packed weight instead of its own."""
    layer._parameters.pop("weight", None)
    vars(layer).pop("forward", None)  # of a lean layer; a packed layer is lean anyway
    layer.__class__ = KINDS[type(layer)]
    layer.keep(fmt, packed, shape, dtype)
