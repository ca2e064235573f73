"""What a memory policy does to a model: which modules are on the device, and what their layers save."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop.memory.lean import make_lean
from alignprop.models.base import Model
from alignprop.settings.memory_policies import MemoryPolicy


class Residency:
    """Brings to the device what the phase at hand uses.

    Phases: "encode" (prompts to embeddings), "denoise" (rollout and sweep), "decode" (VAE and reward) and "measure"
    (rewards that are only measured). The modules of "encode" and "measure", which are seldom used, leave the device
    after their phase; those of the others do so where `residency` is "phase".

    Only frozen tensors move. Their values on the host stay as they are, so that leaving costs nothing: they go over
    the bus once for each time that their phase is entered.

    Args:
        device: where modules compute.
        phases: the modules of each phase; a module may be in several.
        residency: "all" or "phase".
        copy: also where host and device are the same, so that an account sees modules come and go.
    """

    def __init__(
        self, device: torch.device, phases: Mapping[str, Iterable[nn.Module]], residency: str = "all", copy=False
    ):
        self.device, self.copy = device, copy
        self.phases = {phase: list(modules) for phase, modules in phases.items()}
        self.leaving = set(self.phases) if residency == "phase" else {"encode", "measure"}
        self.phase = ""
        self._on_host: list[tuple[torch.Tensor, torch.Tensor]] = []
        for phase, modules in self.phases.items():
            if phase not in self.leaving:
                for module in modules:
                    module.to(device)
            elif device.type == "cuda":  # an earlier policy may have left them there
                for tensor in _frozen(modules):
                    tensor.data = tensor.data.cpu()

    def enter(self, phase: str) -> None:
        """Frees the device of the phase before, if that leaves, and brings `phase` there."""
        if phase == self.phase:
            return
        self.leave()
        self.phase = phase
        if phase not in self.leaving:
            return
        for tensor in _frozen(self.phases[phase]):
            host = tensor.data
            if host.device.type == "cpu" and self.device.type == "cuda" and not host.is_pinned():
                host = host.pin_memory()  # several times faster over the bus
            tensor.data = host.to(self.device, non_blocking=True, copy=self.copy)
            self._on_host.append((tensor, host))

    def leave(self) -> None:
        """Back to the values on the host; what was loaded into them in between comes along next time."""
        for tensor, host in self._on_host:
            tensor.data = host
        self._on_host, self.phase = [], ""


def _frozen(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return [tensor for tensor in tensors.values() if not tensor.requires_grad]


def apply_policy(model: Model, policy: MemoryPolicy) -> None:
    """Makes the layers of `model` save what `policy` says; after its adapter has been added."""
    if policy.lean:
        make_lean(model.denoiser)
        make_lean(model.decoder)
    if policy.block_checkpointing:
        checkpoint_blocks(model.denoiser)
    if policy.decoder_checkpointing:
        checkpoint_layers(model.decoder)


def checkpoint_blocks(denoiser: nn.Module) -> None:
    """Each transformer block of a denoiser recomputes its activations in the backward pass.

    diffusers' own checkpointing does so for a UNet's resnets too. Lean ones keep little, and convolutions cost much to
    compute again: for Stable Diffusion 1.5 a fifth of the operations with 50 active steps instead of an eighth, for 1 %
    less memory.
    """
    names = getattr(denoiser, "_repeated_blocks", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not blocks:
        denoiser.enable_gradient_checkpointing()
    _checkpoint(blocks)


def checkpoint_layers(decoder: nn.Module) -> None:
    """Each resnet, upsampling and attention layer of a VAE recomputes its activations in the backward pass.

    diffusers' own checkpointing does so for whole blocks of three resnets, which then are all held at once.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    _checkpoint(m for m in decoder.modules() if isinstance(m, Attention | ResnetBlock2D | Upsample2D))


def _checkpoint(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if not hasattr(module, "checkpointed"):
            module.checkpointed = module.forward
            module.forward = _checkpointed(module.forward)


def _checkpointed(forward):
    def call(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing here is random.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
