"""Fields of memory: what is traded for it. Rounding apart, none of them changes a result.

The prices are those of Stable Diffusion 1.5 at 512² in bf16 with 4 samples and a CLIP ViT-L reward. The policy "lean"
peaks there at 6.4 GiB in the sweep and at 6.5 GiB in the decode.
"""

from alignprop.settings.fields.field import ALIGN_PROP, GRADIENTS, GUIDANCE, TRAINING, Field
from alignprop.settings.fields.rules import boolean, choice, integer, optional
from alignprop.settings.memory_policies import POLICIES

FIELDS = (
    Field(
        "memory_policy", "auto", choice("auto", *POLICIES),
        "The values of all fields of `memory` that are None. 'auto': of the policies, from the fastest to the most "
        "frugal, the first that fits the GPU; on a CPU, 'fast'.",
    ),
    Field(
        "memory.sweep_chunk", None, optional(integer(0)),
        "Samples in a network call. 0: all; few leave a GPU idle. With 1 the sweep needs 3.3 instead of 6.4 GiB.",
    ),
    Field(
        "memory.decode_chunk", None, optional(integer(0)),
        "Samples that are decoded and scored at once. 0: all; few leave a GPU idle. With 1 the decode needs 3.3 "
        "instead of 6.5 GiB.",
    ),
    Field(
        "memory.guidance_batching", None, optional(choice("joint", "split")),
        "The branches of guidance are in one call, or in two of half the size, one after the other. Split, the sweep "
        "needs 4.3 instead of 6.4 GiB.", (GUIDANCE,),
    ),
    Field(
        "memory.keep_steps", None, optional(integer(0)),
        "How many of the last active steps keep their activations instead of computing them again. Each costs 3.7 GiB "
        "and saves 0.6 % of the operations with 50 active steps, 1.8 % with 1.", (TRAINING, ALIGN_PROP),
    ),
    Field(
        "memory.block_checkpointing", None, optional(boolean()),
        "The denoiser's activations are computed again, block by block. The sweep needs 3.9 instead of 6.4 GiB, and "
        "12 % more operations with 50 active steps, 1 % with 1.", (GRADIENTS,),
    ),
    Field(
        "memory.decoder_checkpointing", None, optional(boolean()),
        "The VAE's activations are computed again, layer by layer. The decode needs 5.3 instead of 6.5 GiB, and 0.4 % "
        "more operations with 50 active steps, 1 % with 1.", (GRADIENTS, ALIGN_PROP),
    ),
    Field(
        "memory.residency", None, optional(choice("all", "phase")),
        "Which modules are on the device: all, or those that the phase at hand uses. By phase the sweep needs 0.7 GiB "
        "less, the decode 1.6 GiB, and each micro-batch moves 2.3 GiB.",
    ),
    Field(
        "memory.lean", None, optional(boolean()),
        "Frozen layers keep only what their own backward pass needs, and compute norms and activations again. Without "
        "it the sweep needs 10.4 instead of 6.4 GiB, the decode 14.1 instead of 6.5. On a CPU it takes 4 % more time.",
    ),
)  # fmt: skip
