"""Keeps activations on the host between the forward and the backward pass."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks


def decode_activations_on(where: str, device: torch.device) -> AbstractContextManager:
    """Returns a context in which the activations of the decode are kept on the "device" or the "host".

    On a CPU both are the same.
    """
    return KeptOnHost() if where == "host" and device.type != "cpu" else nullcontext()


class KeptOnHost(saved_tensors_hooks):
    """A context in which activations that the backward pass needs wait on the host.

    Each is copied to pinned memory when its layer has computed, and back when the backward pass reaches the layer. So
    the device holds those of about one layer. Weights, which need no gradient here, stay where they are. A tensor
    without data stands on the host for its shape alone, so an `Account` of meta tensors does not count it there.
    """

    def __init__(self):
        super().__init__(self._to_host, self._back)

    @staticmethod
    def _to_host(tensor: torch.Tensor):
        if not tensor.requires_grad or tensor.is_leaf:
            return tensor, None
        if tensor.is_meta:
            return (tensor.shape, tensor.stride(), tensor.dtype), tensor.device
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        return host.copy_(tensor, non_blocking=True), tensor.device

    @staticmethod
    def _back(kept):
        host, device = kept
        if device is None:
            return host
        if device.type == "meta":
            shape, stride, dtype = host
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return host.to(device, non_blocking=True)
