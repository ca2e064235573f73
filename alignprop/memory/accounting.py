"""Counts the bytes and FLOPs of a computation operator by operator, on a real device or on torch's meta device.

On the meta device tensors have shapes and no data. Code runs there quickly, without weights and without memory, and
its operators allocate storages of the same sizes. So memory is planned by running the real code. Formulas would have
to follow every change of that code.

Three things are not counted: memory that an operator uses only while it runs (such as a convolution's workspace),
fragmentation in the allocator, and the context of the device.
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

from alignprop.memory.layouts import run_on_meta

BLOCK = 512  # bytes; CUDA's caching allocator rounds every allocation up to a multiple of this

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's registry lacks the CPU's fused attention and the product of integers, which would count as nothing.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten._int_mm: lambda a, b, *_, **__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    _FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}


class Account(TorchDispatchMode):
    """While active, counts the storages alive on one kind of device, and the floating point operations done there.

    A storage counts from the operator that allocates it until it is freed. It counts once, however many tensors view
    it. Storages that existed before do not count unless they are given to `track`. Attention on meta tensors counts as
    the fused kernel that a real device runs.

    Args:
        device_type: "cpu", "cuda", "meta", …

    Attributes:
        bytes: the bytes of the counted storages that are alive now, each rounded up to a multiple of `BLOCK`.
        peaks: the highest value of `bytes` in each phase. Storages left from an earlier phase are included.
        flops: the floating point operations in each phase. Each multiply-add of matrix products, convolutions and
            attention counts as two; other operations do not count.
        operators: the number of operators in each phase, each of which costs the host some time.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.bytes = 0
        self.peaks: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.operators: dict[str, int] = {}
        self._phase = ""
        self._storages: dict[int, tuple[int, weakref.ref]] = {}  # address: (size, weak reference)

    @property
    def peak(self) -> int:
        """The highest value that `bytes` has had."""
        return max(self.peaks.values(), default=0)

    @contextmanager
    def phase(self, name: str):
        """Counts peaks and FLOPs for the phase `name` in the `with` block; outside of all phases the name is ""."""
        outer, self._phase = self._phase, name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = outer

    def track(self, *things) -> None:
        """Counts storages that existed before.

        Args:
            things: modules, tensors, and lists, tuples and dicts of them. Of a module its parameters, their gradients
                and its buffers count.

        Raises:
            TypeError: a thing is neither a module nor a tensor.
        """
        for tensor in _tensors(things):
            self._count(tensor)

    def untrack(self, *things) -> None:
        """Stops counting these things, as if they had left the device."""
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
        if torch.is_inference_mode_enabled():  # there `linear` is not split up, and would count as nothing
            raise RuntimeError("an Account cannot see into torch.inference_mode(); use torch.no_grad()")
        # An output that shares the storage of an input is a view of it, or is the input itself, changed in place.
        inputs = {t.untyped_storage()._cdata for t in _arguments([args, kwargs], [])}
        out = run_on_meta(func, args, kwargs, inputs) if self.device_type == "meta" else func(*args, **kwargs)
        outputs = [t for t in _arguments(out, []) if t.device.type == self.device_type]
        for tensor in outputs:
            address = tensor.untyped_storage()._cdata
            if address in self._storages or address not in inputs:
                self._count(tensor)
        self.operators[self._phase] = self.operators.get(self._phase, 0) + 1
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
        self._release(address)  # a storage at this address has been resized
        self._storages[address] = size, weakref.ref(storage, lambda _: self._release(address))
        self.bytes += size
        self._note_peak()

    def _release(self, address: int) -> None:
        size, _ = self._storages.pop(address, (0, None))
        self.bytes -= size

    def _note_peak(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.bytes)


def _arguments(thing, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """Adds to `found` the tensors in an argument of an operator, and returns it; faster than torch's `tree_iter`."""
    if isinstance(thing, torch.Tensor):
        found.append(thing)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            _arguments(item, found)
    elif isinstance(thing, dict):
        for item in thing.values():
            _arguments(item, found)
    return found


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
    """Gives attention on meta tensors a fused kernel, until the library is destroyed.

    By default attention there consists of matrix products, which keep every attention matrix. These are gigabytes that
    no real device keeps. A `TorchFunctionMode` does not suffice, because torch suspends it within `backward`, where
    checkpoints are recomputed.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention_on_meta, "AutogradMeta")
    return library


def _attention_on_meta(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> torch.Tensor:
    """Computes attention by the CPU's fused kernel, which has a meta implementation with a backward pass."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), float("-inf")))
    if query.dim() != 4 or query.shape[-1] != value.shape[-1]:  # no device has a fused kernel for these
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    return _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def on_meta(thing):
    """Returns a deep copy of a module, or of any object that holds modules, with every tensor on the meta device.

    No data are copied. A tensor that is used in several places is still a single tensor in the copy.
    """
    with _MetaCopies():
        return copy.deepcopy(thing)


class _MetaCopies(TorchFunctionMode):
    """Makes `copy.deepcopy` copy the shape of a tensor instead of the tensor, in the `with` block."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # the latter is how a parameter copies itself
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))
