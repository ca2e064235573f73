"""Linear layers that multiply in 8 bits, for hardware whose matrix units are faster with them.

The weight of such a layer is packed as int8 or fp8, with a scale for each output channel (formats.py). The layer rounds
its input to the same type, with a scale for each row, multiplies the two, and multiplies the sums by both scales. The
backward pass does the same with the gradient of the output, and counts the rounding as the identity. So pictures and
gradients have errors that those of a packed layer do not have; docs/memory.md has their size.
"""

from collections.abc import Iterable

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alignprop.models.formats import PerChannel, not_zero
from alignprop.models.packed import PackedLinear

FEWEST = 17  # rows; CUDA's product of integers takes no fewer
MULTIPLE = 16  # CUDA's products of 8 bits need widths that are multiples of this


class NarrowLinear(PackedLinear):
    """A packed layer that multiplies in 8 bits wherever the hardware can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, wide = self.weight_shape
        if x.numel() < FEWEST * wide or out % MULTIPLE or wide % MULTIPLE:
            return super().forward(x)
        return _narrow_linear(x, self) if not torch.is_grad_enabled() else _NarrowLinear.apply(x, self)


class _NarrowLinear(Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return _narrow_linear(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        packed = ctx.layer.packed_now()
        # The scale of an output channel is inside this sum, so the gradient takes it before it is rounded.
        scaled = _widened(grad) * packed["scale"].view(-1)
        return _multiply(scaled, packed["values"], ctx.layer.format).to(ctx.dtype), None


def _narrow_linear(x: torch.Tensor, layer: NarrowLinear) -> torch.Tensor:
    packed, dtype = layer.packed_now(), layer.weight_dtype
    y = _multiply(_widened(x.to(dtype)), packed["values"].t(), layer.format)
    y = y.mul_(packed["scale"].view(-1)).to(dtype)
    return y if layer.bias is None else y.add_(layer.bias)


def _widened(values: torch.Tensor) -> torch.Tensor:
    """Returns the values in a type that holds them while they wait for a scale: float16 is too narrow."""
    return values.float() if values.dtype == torch.float16 else values


def _multiply(left: torch.Tensor, right: torch.Tensor, fmt: PerChannel) -> torch.Tensor:
    """Returns `left` [..., n], rounded to 8 bits row by row, times `right` [n, m], which has 8 bits."""
    rows = left.flatten(0, -2)
    scale = not_zero(rows.abs().amax(1, keepdim=True) / fmt.largest)
    # A GPU takes the first matrix in the order of rows, and the second one in the order of columns.
    values = fmt.round(rows / scale).contiguous()
    right = right.t().contiguous().t()
    if fmt.dtype == torch.int8 and left.is_cpu:  # there torch's own product of integers is 20 times slower
        sums = (values.float() @ right.float()).to(left.dtype)
    elif fmt.dtype == torch.int8:
        sums = torch._int_mm(values, right).to(left.dtype)
    else:
        one = torch.ones((), device=left.device)
        sums = torch._scaled_mm(values, right, one, one, out_dtype=left.dtype)
    return sums.mul_(scale).unflatten(0, left.shape[:-1])


def multiply_in_8_bits(layers: Iterable[torch.nn.Module]) -> None:
    """Makes those of the layers multiply in 8 bits that are packed linear ones in a format of 8 bits."""
    for layer in layers:
        if type(layer) is PackedLinear and isinstance(layer.format, PerChannel):
            layer.__class__ = NarrowLinear
