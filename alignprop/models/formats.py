"""The formats in which frozen weights are kept: fewer bits for each weight, and the way back.

    int8, fp8    8 bits, and a scale for each output channel, so that the largest weight of the channel is kept exactly
    int4         4 bits, and a scale and a least value for each 64 weights: 4.5 bits in half precision
    nf4          4 bits on a normal distribution's quantiles, with scales in 8 bits: 4.13 bits (Dettmers et al. 2023,
                 arXiv 2305.14314); the package bitsandbytes computes it
    gguf types   those of llama.cpp, as a file brings them; diffusers reads them, with the package gguf

The first three need only torch. All of them work on a GPU, on a CPU and on tensors without data.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from alignprop.settings.errors import ConfigError

GROUP = 64  # weights that share a scale in the formats of 4 bits
PACKAGES = {"nf4": "bitsandbytes", "gguf": "gguf"}  # the packages that a format needs beside torch


class Format(Protocol):
    """A way of keeping a weight."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the tensors that are kept instead of a floating-point weight of any shape [out, in, …]."""

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight that the packed tensors stand for."""


@dataclass(frozen=True)
class Plain:
    """The weight as it is, for layers whose weight only has to come from the host."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight}

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return packed["weight"]


@dataclass(frozen=True)
class PerChannel:
    """8 bits for each weight, and a scale for each output channel.

    Attributes:
        dtype: the type of 8 bits.
        largest: the value in it that stands for the largest weight of a channel.
    """

    dtype: torch.dtype
    largest: float

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = weight.float().flatten(1)
        # The scale is rounded first, so that its rounding does not stretch or shrink a whole channel.
        scale = not_zero((rows.abs().amax(1, keepdim=True) / self.largest).to(weight.dtype))
        return {"values": self.round(rows / scale.float()), "scale": scale}

    def round(self, scaled: torch.Tensor) -> torch.Tensor:
        """Rounds values, of which the largest should be `largest`, to the type of 8 bits."""
        scaled = scaled.clamp(-self.largest, self.largest)
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype)

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return packed["values"].to(dtype).mul_(packed["scale"].to(dtype)).view(shape)


def not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Returns the scale, with 1 in place of 0: all weights that it scales are equal, and any scale will do."""
    return scale.masked_fill(scale == 0, 1)


@dataclass(frozen=True)
class Int4:
    """Integers from 0 to 15, two in a byte, with a scale and a least value for each `GROUP` weights."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.float().reshape(-1, GROUP)
        least = groups.amin(1, keepdim=True).to(weight.dtype)
        scale = not_zero(((groups.amax(1, keepdim=True) - least.float()) / 15).to(weight.dtype))
        values = ((groups - least.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        low, high = values.chunk(2, dim=1)
        return {"values": low | high << 4, "scale": scale, "least": least}

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        values = torch.cat([packed["values"] & 15, packed["values"] >> 4], dim=1).to(dtype)
        return values.mul_(packed["scale"].to(dtype)).add_(packed["least"].to(dtype)).view(shape)


@dataclass(frozen=True)
class NF4:
    """bitsandbytes' normal float of 4 bits, with its scales in 8 bits ("double quantisation")."""

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes import functional

        values, state = functional.quantize_4bit(weight.contiguous(), blocksize=GROUP, quant_type="nf4")
        offset = state.absmax.mean()
        # With a table of its own, because bitsandbytes would remember one that has no data.
        absmax, nested = functional.quantize_blockwise(state.absmax - offset, _table(weight.device), blocksize=256)
        return {"values": values, "absmax": absmax, "scale": nested.absmax, "offset": offset}

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        import bitsandbytes  # noqa: F401 - it registers the operators

        absmax = packed["absmax"]
        if "scale" in packed:  # files of bitsandbytes may have the scales in float32
            table = _table(absmax.device)
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, packed["scale"], table, 256, torch.float32)
            absmax += packed["offset"]
        return torch.ops.bitsandbytes.dequantize_4bit(packed["values"], absmax, GROUP, "nf4", shape, dtype)


_TABLES: dict[torch.device, torch.Tensor] = {}


def _table(device: torch.device) -> torch.Tensor:
    """Returns the 256 values of bitsandbytes' dynamic 8-bit type, float32."""
    from bitsandbytes.functional import create_dynamic_map

    if device not in _TABLES:
        _TABLES[device] = create_dynamic_map().to(device)
    return _TABLES[device]


@dataclass(frozen=True)
class GGUF:
    """One of llama.cpp's types.

    Attributes:
        kind: its number (gguf.GGMLQuantizationType).
    """

    kind: int

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError("weights come in this format from a file")

    def unpack(self, packed: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

        block_size, type_size = GGML_QUANT_SIZES[self.kind]
        blocks = packed["values"].view(torch.uint8).reshape(-1, type_size)
        return dequantize_functions[self.kind](blocks, block_size, type_size, dtype).reshape(shape).to(dtype)


FORMATS: dict[str, Format] = {
    "int8": PerChannel(torch.int8, 127),
    "fp8": PerChannel(torch.float8_e4m3fn, 448),
    "int4": Int4(),
    "nf4": NF4(),
}
"""The formats in which a weight can be put, by their names in the configuration."""


def find_format(name: str, field: str) -> Format:
    """Returns a format by its name.

    Raises:
        ConfigError: its package is not installed.
    """
    check_packages(name, field)
    return FORMATS[name]


def check_packages(name: str, field: str) -> None:
    """Checks that the package which a format needs is installed.

    Raises:
        ConfigError: it is not; the message says what to install.
    """
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise ConfigError(f"{field} = {name!r} needs the package {package}: pip install 'alignprop[quant]'")
