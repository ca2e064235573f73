"""Moves the modules that a phase of a run needs to the device."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from alignprop.evaluation.judges import Judges
from alignprop.memory.streaming import Stream
from alignprop.models.base import Model


class Residency:
    """Brings the modules of the current phase to the device: `with residency("decode"): …`.

    The phases are "encode" (prompts to embeddings), "denoise" (the rollout), "decode" (VAE and reward), "sweep" and
    "compare" (network calls with gradient), and "measure" (rewards that are only measured). The modules of "encode" and
    "measure" are seldom used, and leave the device when another phase begins. The modules of the other phases do so
    only if `residency` is "phase" or "stream". Nothing moves between two phases with the same modules. With "stream"
    the weights of large layers never come as a whole: each is brought for the call that needs it (streaming.py).

    Only frozen tensors move. Their values also stay on the host, so leaving the device costs nothing. They are copied
    to the device once each time that their phase begins.

    Args:
        device: the device on which modules compute.
        phases: the modules of each phase. A module may be in several phases.
        residency: "all", "phase" or "stream".
        copy: whether to copy even if host and device are the same, so that an account sees modules come and go.

    Attributes:
        phase: the phase that has its modules on the device; "" before the first phase.
        leaving: the phases whose modules leave the device when another phase begins.
        stream: brings the weights of large layers; None unless `residency` is "stream".
        moved: the bytes that have come to the device at the beginning of phases.
    """

    def __init__(
        self, device: torch.device, phases: Mapping[str, Iterable[nn.Module]], residency: str = "all", copy=False
    ):
        self.device, self.copy = device, copy
        self.phases = {phase: list(modules) for phase, modules in phases.items()}
        self.leaving = {"encode", "measure"} if residency == "all" else set(self.phases)
        self.moved = 0
        self.phase = self._inside = ""
        self._on_host: list[tuple[torch.Tensor, torch.Tensor]] = []
        for phase, modules in self.phases.items():
            if phase not in self.leaving:
                for module in modules:
                    module.to(device)
            elif device.type == "cuda":  # an earlier policy may have left the modules there
                for tensor in _frozen(modules):
                    tensor.data = tensor.data.cpu()

        networks = {id(module): module for modules in self.phases.values() for module in modules}
        self.stream = Stream(device, networks.values()) if residency == "stream" else None

    @property
    def streamed(self) -> int:
        """The bytes of single weights that have come to the device."""
        return self.stream.moved if self.stream else 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Brings the modules of `phase` to the device, and after the block those of an enclosing phase, if any.

        The modules stay there until another phase begins, because the next samples often enter the same phase at once.
        """
        around = self._inside
        self._enter(phase)
        self._inside = phase
        try:
            yield
        finally:
            self._inside = around
            if around:
                self._enter(around)

    def leave(self) -> None:
        """Puts the host's values back into the tensors. Values loaded into them later go to the device next time."""
        for tensor, host in self._on_host:
            tensor.data = host
        self._on_host, self.phase = [], ""
        if self.stream:
            self.stream.wait()

    def _enter(self, phase: str) -> None:
        stays = self.phase and self.phases[phase] == self.phases[self.phase]
        if not stays:
            self.leave()
        self.phase = phase
        if stays or phase not in self.leaving:
            return
        for tensor in _frozen(self.phases[phase]):
            host = tensor.data
            if host.device.type == "cpu" and self.device.type == "cuda" and not host.is_pinned():
                host = host.pin_memory()  # copying from pinned memory is several times faster
            tensor.data = host.to(self.device, non_blocking=True, copy=self.copy)
            self.moved += host.nbytes
            self._on_host.append((tensor, host))


def phases_of(model: Model, judges: Judges) -> dict[str, list[nn.Module]]:
    """Returns the modules that each phase of a run uses."""
    networks = [model.denoiser]
    return {
        "encode": model.text_encoders,
        "denoise": networks,
        "decode": [model.decoder, judges.reward],
        "sweep": networks,
        "compare": networks,
        "measure": [judge for judge in judges.phases["measure"] if judge],
    }


def _frozen(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return [tensor for tensor in tensors.values() if not tensor.requires_grad]
