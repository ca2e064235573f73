"""Common GPUs, and the seconds that a forecast takes on them.

A step waits for the slowest of three things: the host, which launches the operators one by one; the matrix units; and
the bus, over which streamed weights come. On an H100 Stable Diffusion 1.5 and SDXL with the policy "balanced" waited
for the host (docs/gpu.md): 16.6 and 14.3 microseconds an operator. So their prediction is off by 7 and 8 %. Nothing
else has been compared with a measurement yet.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from alignprop.memory.forecast import Forecast

LAUNCH = 15.4e-6  # seconds of the host for an operator with its Python code
SHARE = 0.6  # the share of a large matrix product's speed that networks are assumed to reach


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        gib: its memory in GiB.
        flops: the FLOP/s of a large matrix product, in bf16 with sums in float32 unless it was measured.
        bus: the bytes per second from pinned memory of the host.
    """

    gib: float
    flops: float
    bus: float


# The pace of the H100 was measured (docs/gpu.md). The others are the makers' peaks, for dense matrices. The bus is
# taken to reach four fifths of the rate of its PCIe generation.
GPUS = {
    "h100": Gpu(79.2, 783e12, 50e9),
    "a100": Gpu(79.2, 312e12, 25e9),
    "4090": Gpu(23.5, 165e12, 25e9),
    "3090": Gpu(23.5, 71e12, 25e9),
    "4060ti": Gpu(15.6, 44e12, 13e9),
}


def seconds_per_sample(forecast: Forecast, gpu: Gpu) -> float:
    """Returns the predicted seconds of a training step for each of its samples."""
    computing = max(forecast.operators * LAUNCH, forecast.flops / (gpu.flops * SHARE))
    return max(computing, forecast.streamed / gpu.bus) + forecast.moved / gpu.bus


def measure(device: torch.device, gib: float, dtype: torch.dtype, side: int = 8192, copied: int = 2**29) -> Gpu:
    """Measures the matrix units and the bus of a GPU, which takes about a second.

    Args:
        device: the GPU.
        gib: its memory in GiB.
        dtype: the type of the matrices.
        side: the side of the square matrices that are multiplied.
        copied: the bytes that are copied from pinned memory of the host.
    """
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    host = torch.empty(copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    here = torch.empty_like(host, device=device, pin_memory=False)
    product = _seconds(lambda: matrix @ matrix, device)
    return Gpu(gib, 2 * side**3 / product, copied / _seconds(lambda: here.copy_(host, non_blocking=True), device))


def _seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Returns the least seconds that the work took in a few trials, after one that warms up."""

    def trial() -> float:
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - start

    return min([trial() for _ in range(1 + times)][1:])


def wait(device: torch.device) -> None:
    """Waits until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
