"""The fields of memory, which trade speed for memory. They change results only by rounding.

The figures in the help texts are those of Stable Diffusion 1.5 at 512² in bf16 with 4 samples and a CLIP ViT-L reward.
The policy "lean" has a peak there of 6.4 GiB in the sweep and of 6.5 GiB in the decode.
"""

from alignprop.settings.fields.field import ALIGN_PROP, GRADIENTS, GUIDANCE, TRAINING, Field
from alignprop.settings.memory_policies import POLICIES
from rewards.rules import boolean, choice, integer, optional

FIELDS = (
    Field(
        "memory_policy", "auto", choice("auto", *POLICIES),
        "The policy that gives a value to every field of `memory` that is None. 'auto' takes the fastest policy that "
        "fits the GPU in training, 'fast' on a CPU or without training, and 'balanced' under FSDP2. The figures of the "
        "fields below are those of Stable Diffusion 1.5 at 512² in bf16 with 4 samples and a CLIP ViT-L reward, "
        "compared with the policy 'lean'. docs/memory.md compares the policies.",
    ),
    Field(
        "memory.sweep_chunk", None, optional(integer(0)),
        "The number of samples in one network call of the rollout or the sweep. 0 takes the whole micro-batch. A small "
        "number leaves a GPU partly idle. With 1 the sweep needs 3.3 instead of 6.4 GiB.",
    ),
    Field(
        "memory.decode_chunk", None, optional(integer(0)),
        "The number of samples that are decoded and scored at once. 0 takes the whole micro-batch. A small number "
        "leaves a GPU partly idle. With 1 the decode needs 3.3 instead of 6.5 GiB.",
    ),
    Field(
        "memory.decode_activations", None, optional(choice("device", "host")),
        "Where the activations of the VAE and the reward wait for the backward pass. With 'host' each is copied to the "
        "host and back, in turn with the computation, and a GPU holds those of about one layer. No bit of a result "
        "changes. On a CPU it has no effect.", (GRADIENTS, ALIGN_PROP),
    ),
    Field(
        "memory.decode_tiles", None, optional(integer(0)),
        "The side in pixels of the overlapping tiles in which the VAE decodes large pictures one by one, with "
        "and without gradient. This is an approximation: pictures differ a little from those of a whole decode "
        "(docs/memory.md). 0, the value of every policy, decodes the whole picture.",
    ),
    Field(
        "memory.guidance_batching", None, optional(choice("joint", "split")),
        "How the two branches of guidance are computed: 'joint' makes one network call for both, and 'split' makes two "
        "calls of half the size, one after the other. With 'split' the sweep needs 4.3 instead of 6.4 GiB.",
        (GUIDANCE,),
    ),
    Field(
        "memory.keep_steps", None, optional(integer(0)),
        "The number of last active steps that keep their activations for the sweep, which then does not compute them "
        "again. Each such step costs 3.7 GiB. It saves 0.6 % of the operations with 50 active steps and 1.8 % with 1. "
        "It must be 0 if memory.residency = 'phase'.", (TRAINING, ALIGN_PROP),
    ),
    Field(
        "memory.block_checkpointing", None, optional(boolean()),
        "If True, the backward pass computes the denoiser's activations again, block by block. The sweep then needs "
        "3.9 instead of 6.4 GiB. There are 12 % more operations with 50 active steps and 1 % more with 1.",
        (GRADIENTS,),
    ),
    Field(
        "memory.decoder_checkpointing", None, optional(boolean()),
        "If True, the backward pass computes the VAE's activations again, layer by layer. The decode then needs 5.3 "
        "instead of 6.5 GiB. There are 0.4 % more operations with 50 active steps and 1 % more with 1.",
        (GRADIENTS, ALIGN_PROP),
    ),
    Field(
        "memory.residency", None, optional(choice("all", "phase", "stream")),
        "Which weights are on the device: 'all' of them, or only those that the current 'phase' of a step uses. With "
        "'phase' the sweep needs 0.7 GiB less and the decode 1.6 GiB less, and each micro-batch moves 2.3 GiB. "
        "With 'stream' the weights stay on the host, and each large layer's weight comes for every call of the layer, "
        "while the layer before it computes. Both need use_lora = True.",
    ),
    Field(
        "memory.lean", None, optional(boolean()),
        "If True, frozen layers keep only what their own backward pass needs, and compute norms and activations again. "
        "Without it the sweep needs 10.4 instead of 6.4 GiB, and the decode 14.1 instead of 6.5 GiB. On a CPU it takes "
        "4 % more time.",
    ),
)  # fmt: skip
