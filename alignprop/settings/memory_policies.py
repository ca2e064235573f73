"""Memory policies, which trade speed for memory. They change gradients and pictures only by rounding.

The exception is `decode_tiles`, which no policy sets.
"""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class MemoryPolicy:
    """One value for each field of the configuration's `memory`. docs/config.md says what each of them costs.

    Attributes:
        sweep_chunk: the samples in one network call, in the rollout and in the sweep. 0 is the whole micro-batch.
        decode_chunk: the samples in one VAE decode, one reward and their backward pass. 0 is the whole micro-batch.
        decode_activations: "device", or "host" from which they come back for the backward pass of decode and reward.
        decode_tiles: the side in pixels of the tiles in which the VAE decodes. 0 decodes a picture as a whole.
        guidance_batching: "joint" computes both branches of classifier-free guidance in one call, "split" one by one.
        keep_steps: for this many last active steps the graph of the rollout is kept, and the sweep needs no new call.
        block_checkpointing: the denoiser's blocks recompute their activations in the backward pass.
        decoder_checkpointing: the VAE's resnets recompute their activations in the backward pass, one by one.
        residency: "all" keeps all modules on the device, "phase" only those that the current phase uses, and "stream"
            only the weight of the layer that computes and of the next one.
        lean: frozen layers save only what their own backward pass needs.
    """

    sweep_chunk: int = 0
    decode_chunk: int = 0
    decode_activations: str = "device"
    decode_tiles: int = 0
    guidance_batching: str = "joint"
    keep_steps: int = 0
    block_checkpointing: bool = False
    decoder_checkpointing: bool = False
    residency: str = "all"
    lean: bool = False


NAMES = tuple(field.name for field in fields(MemoryPolicy))

_FRUGAL = MemoryPolicy(sweep_chunk=1, decode_chunk=1, guidance_batching="split", decoder_checkpointing=True, lean=True)

# From the fastest to the most frugal. Each policy needs less memory than the one before it.
POLICIES = {
    "roomy": MemoryPolicy(keep_steps=1000, lean=True),  # more steps than any chain has, so all are kept
    "fast": MemoryPolicy(),
    "lean": MemoryPolicy(lean=True),
    "balanced": _FRUGAL,
    "small": replace(_FRUGAL, residency="phase"),
    "smallest": replace(_FRUGAL, residency="phase", block_checkpointing=True),
    "streaming": replace(_FRUGAL, residency="stream", block_checkpointing=True),
}


def chunks(count: int, size: int) -> list[slice]:
    """Returns slices that cover `count` samples in order, `size` at a time. Size 0 gives one slice for all samples."""
    size = size or max(count, 1)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
