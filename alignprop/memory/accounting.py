"""Bytes and FLOPs of a computation, counted operator by operator, on a real device or on none at all.

On torch's meta device tensors have shapes and no data: code runs there without weights, without memory and in a
moment, and its operators allocate the same storages. So memory is planned by running the real code, not by formulas
that would have to follow its every change.

What is not seen: memory that an operator uses while it runs (a convolution's workspace), the allocator's
fragmentation, and the device's own context.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

BLOCK = 512  # bytes; CUDA's caching allocator rounds every allocation up to a multiple of it

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's registry lacks the CPU's fused attention, which would count as nothing.
_FORMULAS = {
    **flop_registry,
    _FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}


class Account(TorchDispatchMode):
    """While active, counts the storages alive on one kind of device, and the floating point operations done there.

    A storage counts from the operator that allocates it until it is freed, once however many tensors view it. What
    existed before does not count unless it is given to `track`. Attention on meta tensors counts as the fused kernel
    that a real device would run.

    Args:
        device_type: "cpu", "cuda", "meta", …

    Attributes:
        bytes: of the counted storages that are alive now, each rounded up to a multiple of `BLOCK`.
        peaks: the most that `bytes` has been, by phase; what is left from an earlier phase is included.
        flops: by phase; two per multiply-add of matrix products, convolutions and attention, nothing for the rest.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.bytes = 0
        self.peaks: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._phase = ""
        self._storages: dict[int, tuple[int, weakref.ref]] = {}  # address: size, watch

    @property
    def peak(self) -> int:
        """The most that `bytes` has been."""
        return max(self.peaks.values(), default=0)

    @contextmanager
    def phase(self, name: str):
        """Within it peaks and FLOPs are those of the phase `name`; outside of all phases, of ""."""
        outer, self._phase = self._phase, name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = outer

    def track(self, *things) -> None:
        """Counts what existed before.

        Args:
            things: modules (their parameters, with gradients, and buffers), tensors, lists, tuples and dicts of them.

        Raises:
            TypeError: any other thing.
        """
        for tensor in _tensors(things):
            self._count(tensor)

    def untrack(self, *things) -> None:
        """Counts these no more, as if they had left the device."""
        for tensor in _tensors(things):
            self._release(tensor.untyped_storage()._cdata)

    def __enter__(self):
        self._library = _fuse_attention() if self.device_type == "meta" else None
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._library:
            self._library._destroy()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # `linear` would arrive whole, and count as nothing
            raise RuntimeError("an Account cannot see into torch.inference_mode(); use torch.no_grad()")
        # An output in the storage of an input is a view of it, or the input itself, changed in place.
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        outputs = [t for t in tree_iter(out) if isinstance(t, torch.Tensor) and t.device.type == self.device_type]
        for tensor in outputs:
            address = tensor.untyped_storage()._cdata
            if address in self._storages or address not in inputs:
                self._count(tensor)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula and outputs:
            self.flops[self._phase] = self.flops.get(self._phase, 0) + formula(*args, **kwargs, out_val=out)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        address, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if address in self._storages and self._storages[address][0] == size:
            return
        self._release(address)  # it has been resized
        self._storages[address] = size, weakref.ref(storage, lambda _: self._release(address))
        self.bytes += size
        self._note_peak()

    def _release(self, address: int) -> None:
        size, _ = self._storages.pop(address, (0, None))
        self.bytes -= size

    def _note_peak(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.bytes)


def _tensors(things) -> Iterator[torch.Tensor]:
    for thing in tree_iter(things):
        if isinstance(thing, torch.nn.Module):
            yield from thing.buffers()
            for parameter in thing.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        elif isinstance(thing, torch.Tensor):
            yield thing
        else:
            raise TypeError(f"neither a module nor a tensor: {type(thing).__name__}")


def _fuse_attention() -> torch.library.Library:
    """Gives attention on meta tensors a kernel of its own, until the library is destroyed.

    Left alone it is matrix products that keep every attention matrix: gigabytes that no real device keeps. A
    `TorchFunctionMode` would not do, because torch suspends it within `backward`, where checkpoints are recomputed.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention_on_meta, "AutogradMeta")
    return library


def _attention_on_meta(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> torch.Tensor:
    """As the CPU's fused kernel, the one that has a meta implementation with a backward."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), float("-inf")))
    if query.dim() != 4 or query.shape[-1] != value.shape[-1]:  # no device has a fused kernel for these
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def on_meta(thing):
    """A deep copy of a module, or of any object that holds modules, with every tensor on the meta device.

    No data are copied. Tensors that were one stay one.
    """
    with _MetaCopies():
        return copy.deepcopy(thing)


class _MetaCopies(TorchFunctionMode):
    """Within it `copy.deepcopy` copies the shape of a tensor instead of the tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # the latter is how a parameter copies itself
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))
