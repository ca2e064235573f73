"""Memory policies: what to trade for memory. None of them changes a gradient or a picture but for rounding."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class MemoryPolicy:
    """One value for each field of the configuration's `memory`; docs/config.md has their prices.

    Attributes:
        sweep_chunk: samples per network call, in the rollout and in the sweep; 0: the whole micro-batch.
        decode_chunk: samples per VAE decode, reward and their backward pass; 0: the whole micro-batch.
        guidance_batching: "joint", both branches of classifier-free guidance in one call, or "split", one by one.
        keep_steps: the graphs of that many last active steps stay from the rollout and are not called again.
        block_checkpointing: the denoiser's blocks recompute their activations in the backward pass.
        decoder_checkpointing: so do the VAE's resnets, one by one.
        residency: "all" modules stay on the device, or only those that the "phase" at hand uses.
        lean: frozen layers save only what their own backward pass needs.
    """

    sweep_chunk: int = 0
    decode_chunk: int = 0
    guidance_batching: str = "joint"
    keep_steps: int = 0
    block_checkpointing: bool = False
    decoder_checkpointing: bool = False
    residency: str = "all"
    lean: bool = False


NAMES = tuple(field.name for field in fields(MemoryPolicy))

_FRUGAL = MemoryPolicy(sweep_chunk=1, decode_chunk=1, guidance_batching="split", decoder_checkpointing=True, lean=True)

# From the fastest to the most frugal; each needs less memory than the one before.
POLICIES = {
    "roomy": MemoryPolicy(keep_steps=1000, lean=True),  # more steps than any chain has: all
    "fast": MemoryPolicy(),
    "lean": MemoryPolicy(lean=True),
    "balanced": _FRUGAL,
    "small": replace(_FRUGAL, residency="phase"),
    "smallest": replace(_FRUGAL, residency="phase", block_checkpointing=True),
}


def chunks(count: int, size: int) -> list[slice]:
    """`count` samples in order, `size` at a time; size 0: all at once."""
    size = size or max(count, 1)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
