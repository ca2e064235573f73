"""The prefix cache: network calls before the first one with gradient reuse the layers of earlier calls.

It is TaylorSeer (Liu et al. 2025, arXiv 2503.06923) as diffusers implements it. Every few calls, all layers compute
their outputs. In the calls between, the blocks of the denoiser predict theirs by a Taylor series in the number of the
call. So the latents are those of a slightly different chain. The first call with gradient and all calls after it are
computed in full, so that the gradient is exact at the latents that the chain visits.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK
from diffusers.models.cache_utils import CacheMixin

FULL_CALLS = 3  # at the start of each chain: they fill the Taylor series up to its second order
# The repeated layers of the denoisers: residual blocks and transformer blocks of U-Nets, and blocks of transformers.
BLOCKS = r"(.*\.)?(resnets|transformer_blocks|single_transformer_blocks)\.\d+|layers\.\d+"


class PrefixCache:
    """Predicts the outputs of the denoiser's blocks while it is on.

    Args:
        denoiser: the network.
        interval: the number of calls from one full call to the next one, at least 2.
        order: the order of the Taylor series. 0 repeats the outputs of the last full call.
    """

    def __init__(self, denoiser: torch.nn.Module, interval: int, order: int):
        self.denoiser, self.is_on, self.branches = denoiser, False, 0
        self.config = TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=FULL_CALLS, max_order=order,
            taylor_factors_dtype=None, cache_identifiers=["|".join(map(re.escape, blocks_of(denoiser)))],
        )  # fmt: skip

    @contextmanager
    def on(self) -> Iterator[None]:
        """Starts with an empty cache, and drops the cache at the end of the `with` block."""
        apply_taylorseer_cache(self.denoiser, self.config)
        registry = HookRegistry.check_if_exists_or_initialize(self.denoiser)
        registry.invalidate_child_registries_cache()
        self.is_on, self.branches = True, 0
        try:
            yield
        finally:
            self.is_on = False
            registry.reset_stateful_hooks()  # frees the tensors now; the hooks themselves are in cycles of references
            registry.remove_hook(_TAYLORSEER_CACHE_HOOK)
            registry.invalidate_child_registries_cache()

    def of(self, first: int, branches: int) -> AbstractContextManager:
        """Returns the context of a network call. Each call of a step has a cache of its own.

        Where guidance begins or ends, the cache starts anew, because calls of a distant part of the chain predict
        badly.

        Args:
            first: the number of the first branch of guidance in the call.
            branches: the number of branches in all calls of the step.
        """
        if not self.is_on:
            return nullcontext()
        if branches != self.branches:
            HookRegistry.check_if_exists_or_initialize(self.denoiser).reset_stateful_hooks()
            self.branches = branches
        return CacheMixin.cache_context(self.denoiser, f"branch {first}")


def blocks_of(denoiser: torch.nn.Module) -> list[str]:
    """Returns the names of the blocks whose outputs are predicted.

    The last block of Stable Diffusion 3 is not among them, because its output for the text is None, which diffusers'
    cache does not expect.
    """
    named = ((name, module) for name, module in denoiser.named_modules() if re.fullmatch(BLOCKS, name))
    return [name for name, module in named if not getattr(module, "context_pre_only", False)]


def is_full(i: int, interval: int) -> bool:
    """Says whether the i-th call since the cache started, counted from 0, computes all layers."""
    return i < FULL_CALLS or (i - FULL_CALLS - 1) % interval == 0


def build_prefix_cache(denoiser: torch.nn.Module, interval: int, order: int) -> PrefixCache | None:
    """Returns the cache, or None if `interval` is 1, which computes every call in full."""
    return PrefixCache(denoiser, interval, order) if interval > 1 else None
