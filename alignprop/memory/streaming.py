"""Weights that stay on the host and are copied to the device layer by layer, each while the layer before it computes.

The order of the layers is learned from the calls: after the same two layers usually comes the same third one, forwards
in the rollout and backwards in the sweep. A wrong guess costs a copy, and changes nothing else.
"""

from collections.abc import Iterable

import torch
from torch import nn

from alignprop.models.formats import Plain
from alignprop.models.packed import Packed, pack, packable

ALIGNED = 512  # bytes; every tensor in a slot starts at a multiple of this


class Stream:
    """Brings the packed weights of layers to the device, in two slots: one is computed with, one is filled.

    Args:
        device: the device on which the layers compute.
        modules: the networks whose large layers give their weights to the stream.

    Attributes:
        moved: the bytes that have been copied to the device.
    """

    def __init__(self, device: torch.device, modules: Iterable[nn.Module]):
        self.device, self.moved = device, 0
        self.layers = [layer for module in modules for layer in _streamable(module)]
        for layer in self.layers:
            layer.give_to(self, pinned=device.type == "cuda")
        self._size = max((sum(map(_room, layer.host.values())) for layer in self.layers), default=0)
        self._slots: list[torch.Tensor] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._here: tuple | None = None  # (layer, its tensors on the device), in slot 0
        self._coming: tuple | None = None  # the same in slot 1, with the event that ends the copy
        self._after: dict[tuple[int, int], Packed] = {}  # after two layers, by their ids, comes this one
        self._last = (0, 0)

    def fetch(self, layer: Packed) -> dict[str, torch.Tensor]:
        """Returns the packed tensors of a layer on the device, which are good until the next layer is fetched."""
        if self._here is None or self._here[0] is not layer:
            if self._coming is None or self._coming[0] is not layer:
                self._send(layer)
            self._here, done = self._coming[:2], self._coming[2]
            self._coming = None
            self._slots.reverse()
            if done is not None:
                torch.cuda.current_stream(self.device).wait_event(done)
            self._after[self._last] = layer
            self._last = (self._last[1], id(layer))
        if self._coming is None and (following := self._after.get(self._last)) is not None:
            self._send(following)
        return self._here[1]

    def wait(self) -> None:
        """Waits for the copy under way, if any. Only then may the slots be given up."""
        if self._copies:
            self._copies.synchronize()

    def _send(self, layer: Packed) -> None:
        """Begins to copy a layer's tensors into slot 1."""
        if not self._slots:
            self._slots = [torch.empty(self._size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        tensors, first, done = {}, 0, None
        if self._copies:  # the layer whose weight was in this slot must have computed
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies), torch.no_grad():
            for name, host in layer.host.items():
                part = self._slots[1][first : first + host.nbytes]
                here = part.view(host.dtype).as_strided(host.shape, host.stride())  # in the same memory format
                tensors[name] = here.copy_(host, non_blocking=True)
                first += _room(host)
                self.moved += host.nbytes
            if self._copies:
                done = self._copies.record_event()
        self._coming = layer, tensors, done


def _streamable(module: nn.Module) -> list[Packed]:
    """Returns the layers of a network that can stream, with their weights packed as they are if they were not yet."""
    pack(packable(module), Plain())
    return [layer for layer in module.modules() if isinstance(layer, Packed)]


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED
