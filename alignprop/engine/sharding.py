"""FSDP2: the denoiser's weights are sharded, so that each process holds a part of every tensor.

accelerate does this, as its configuration file asks (config/accelerate/fsdp2.yaml). This file tells accelerate what it
cannot know: that a LoRA stays whole, how a diffusers model is divided into units, and in which precision gradients are
averaged. It also has the few things that the rest of the code does differently when weights are sharded: all processes
make every network call together, and a tensor is gathered before it is written and sharded after it is read.
"""

import os
import sys
from copy import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from alignprop.models.packed import is_packed
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import MemoryPolicy


def check_engine(accelerator: Accelerator, use_lora: bool, optimizer: str, train_text_encoder=False) -> None:
    """Refuses options of accelerate that training here does not support. Warns if its precision has no effect.

    Args:
        accelerator: the accelerator, made from accelerate's own configuration.
        use_lora: the run's field of this name.
        optimizer: the run's field `train.optimizer`.
        train_text_encoder: the run's field of this name.

    Raises:
        ConfigError: an engine other than FSDP2, or an option of FSDP2 that does not work with the sweep.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", accelerator.mixed_precision) and accelerator.is_main_process:
        ours = f"mixed_precision = {accelerator.mixed_precision!r} decides"
        print(f"warning: accelerate's mixed_precision = {precision!r} has no effect: the run's {ours}", file=sys.stderr)
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(f"accelerate's distributed_type = {kind.value} is not supported; use MULTI_GPU or FSDP")
    if kind is not DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    for field, value, allowed, why in (
        ("fsdp_version", plugin.fsdp_version, 2, ""),
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False, ""),
        ("fsdp_cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False, ""),
        ("fsdp_ignored_modules", plugin.ignored_modules, None, " (a LoRA is left whole without it)"),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, False, "; use memory.block_checkpointing"),
    ):
        if value != allowed:
            raise ConfigError(f"accelerate's {field} = {value} is not supported; it must be {allowed}{why}")
    if train_text_encoder:
        raise ConfigError("train_text_encoder = True is not supported under FSDP; use one of the other configurations")
    if optimizer not in ("adamw", "sgd") and not use_lora:
        raise ConfigError(
            f"train.optimizer = {optimizer!r} cannot train weights that FSDP2 has spread (use_lora = False); "
            "use 'adamw' or 'sgd'"
        )


def is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.FSDP


def check_policy(accelerator: Accelerator, memory: MemoryPolicy, compiled: bool, channels_last: bool | None) -> None:
    """Refuses settings that do not work when FSDP2 gathers the weights for each call and drops them after it.

    Raises:
        ConfigError: the message names the field and the value that it must have.
    """
    if not is_fsdp(accelerator):
        return
    for field, value, allowed in (
        ("memory.keep_steps", memory.keep_steps, 0),
        ("memory.residency", memory.residency, "all"),
        ("compile", compiled, False),
        ("channels_last", bool(channels_last), False),
    ):
        if value != allowed:
            raise ConfigError(f"{field} = {value!r} does not work with FSDP2; it must be {allowed!r}")


def is_sharded(denoiser: torch.nn.Module) -> bool:
    return isinstance(denoiser, FSDPModule)


def shard(accelerator: Accelerator, denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Shards `denoiser` in place. Its trained tensors are sharded too, unless they are an adapter of frozen weights.

    Returns:
        The prepared optimizer, which has the denoiser's new parameters.

    Raises:
        ConfigError: the denoiser's weights are packed.
    """
    if is_packed(denoiser):
        raise ConfigError("FSDP2 cannot spread quantised weights; leave pretrained.quantize empty, or use MULTI_GPU")
    configured = accelerator.state.fsdp_plugin  # accelerate has one plugin for the whole process
    plugin = accelerator.state.fsdp_plugin = copy(configured)
    if any(not p.requires_grad for p in denoiser.parameters()):
        owns_trained = lambda m: any(p.requires_grad for p in m.parameters(recurse=False))  # noqa: E731
        plugin.ignored_modules = [module for module in denoiser.modules() if owns_trained(module)]
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        # A diffusers class may name kinds of blocks that this model does not have.
        present = {type(module).__name__ for module in denoiser.modules()}
        plugin.transformer_cls_names_to_wrap = [n for n in denoiser._no_split_modules or () if n in present]
    if policy := plugin.mixed_precision_policy:
        # Weights are gathered in half precision. Autocast decides what computes in it. Gradients average in float32.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    _, optimizer = accelerator.prepare(denoiser, optimizer)
    accelerator.state.fsdp_plugin = configured
    return optimizer


def release(denoiser: torch.nn.Module) -> None:
    """Drops gathered weights. FSDP keeps some of them after a call, and they are stale once the weights change."""
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def on_any_process(flags: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns, for each entry of `flags`, whether it is true on any process; bool [...]."""
    counts = flags.to(device, torch.uint8)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return counts.to(flags.device, torch.bool)


@torch.no_grad()
def gather(nested, keep: bool = True):
    """Returns the `nested` dicts and lists with every tensor whole and on the CPU, or replaced by None without `keep`.

    All processes have to call it.
    """

    def whole(tensor):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.cpu() if keep else None

    return tree_map_only(torch.Tensor, whole, nested)


def spread(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shards `tensor`, which every process has whole, in the same way as `like`. It stays whole if `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_copy(denoiser: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Returns an unsharded diffusers model like `denoiser`, with the parameters `weights`."""
    with torch.device("meta"):
        whole = type(denoiser).from_config(denoiser.config)  # FSDP's class makes a model of the class that it wraps
    buffers = {name: tensor for name, tensor in denoiser.state_dict().items() if name not in weights}
    whole.load_state_dict({**buffers, **weights}, assign=True)
    return whole
