"""Makes layers recompute their activations in the backward pass instead of keeping them."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed:
    """A module that recomputes its activations in the backward pass instead of keeping them."""

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        # No layer here draws random numbers, so the state of the generators need not be saved.
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_modules(modules: Iterable[nn.Module]) -> None:
    """Gives each module a class of the same name that derives from `Checkpointed` and its old class, as FSDP2 does."""
    for module in modules:
        cls = type(module)
        if not issubclass(cls, Checkpointed):
            module.__class__ = type(cls.__name__, (Checkpointed, cls), {})
