"""Which modules of a run are on the device, phase by phase."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from alignprop.evaluation.judges import Judges
from alignprop.models.base import Model


class Residency:
    """Brings to the device what the phase at hand uses: `with residency("decode"): …`.

    Phases: "encode" (prompts to embeddings), "denoise" (the rollout), "decode" (VAE and reward), "sweep" and "compare"
    (network calls with gradient), "measure" (rewards that are only measured). The modules of "encode" and "measure",
    which are seldom used, leave the device when another phase begins; those of the others do so where `residency` is
    "phase". Phases with the same modules follow each other without a move.

    Only frozen tensors move. Their values on the host stay as they are, so that leaving costs nothing: they go over
    the bus once for each time that their phase begins.

    Args:
        device: where modules compute.
        phases: the modules of each phase; a module may be in several.
        residency: "all" or "phase".
        copy: also where host and device are the same, so that an account sees modules come and go.

    Attributes:
        phase: the one whose modules are on the device; "" before the first.
        leaving: the phases whose modules leave when another begins.
    """

    def __init__(
        self, device: torch.device, phases: Mapping[str, Iterable[nn.Module]], residency: str = "all", copy=False
    ):
        self.device, self.copy = device, copy
        self.phases = {phase: list(modules) for phase, modules in phases.items()}
        self.leaving = set(self.phases) if residency == "phase" else {"encode", "measure"}
        self.phase = self._inside = ""
        self._on_host: list[tuple[torch.Tensor, torch.Tensor]] = []
        for phase, modules in self.phases.items():
            if phase not in self.leaving:
                for module in modules:
                    module.to(device)
            elif device.type == "cuda":  # an earlier policy may have left them there
                for tensor in _frozen(modules):
                    tensor.data = tensor.data.cpu()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within it the modules of `phase` are on the device, and after it those of the phase around it, if any.

        They stay until another phase begins: most phases are entered again at once, by the next samples.
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
        """Back to the values on the host; what was loaded into them in between comes along next time."""
        for tensor, host in self._on_host:
            tensor.data = host
        self._on_host, self.phase = [], ""

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
                host = host.pin_memory()  # several times faster over the bus
            tensor.data = host.to(self.device, non_blocking=True, copy=self.copy)
            self._on_host.append((tensor, host))


def phases_of(model: Model, judges: Judges) -> dict[str, list[nn.Module]]:
    """The modules that each phase of a run uses."""
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
