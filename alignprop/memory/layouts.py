"""Runs operators on meta tensors, and remembers the layouts of their results, because finding them takes long."""

import functools
from collections.abc import ItemsView

import torch

# Most operators on meta tensors are Python functions, which call many others to find a shape. A step calls the same
# operators with the same shapes again and again, so each result's layout is found once for the whole process.
_LAYOUTS: dict[tuple, tuple | list] = {}


def run_on_meta(func, args: tuple, kwargs: dict, inputs: set[int]):
    """Returns `func(*args, **kwargs)`, or tensors like those that it returned for arguments like these.

    Args:
        func: an operator.
        args, kwargs: its arguments.
        inputs: the addresses of the storages among them.
    """
    try:
        key = (torch.get_default_dtype(), func, _likeness(args), _likeness(kwargs.items())) if _is_pure(func) else None
        layouts = _LAYOUTS.get(key)
    except TypeError:  # an argument of another kind, which may decide anything
        key = layouts = None
    if layouts is not None:
        out = [layout and torch.empty_strided(*layout[:2], dtype=layout[2], device="meta") for layout in layouts]
        return out[0] if isinstance(layouts, tuple) else out
    out = func(*args, **kwargs)
    if key and inputs:
        several = list(out) if isinstance(out, (tuple, list)) else [out]
        tensors = [tensor for tensor in several if tensor is not None]
        if all(map(_is_plain, tensors)):
            storages = [tensor.untyped_storage()._cdata for tensor in tensors]
            if len(set(storages)) == len(storages) and inputs.isdisjoint(storages):
                layouts = [t if t is None else (tuple(t.shape), t.stride(), t.dtype) for t in several]
                _LAYOUTS[key] = layouts if isinstance(out, (tuple, list)) else tuple(layouts)
    return out


@functools.cache
def _is_pure(func) -> bool:
    """Says whether an operator changes nothing, is not random, and does not declare that it returns a view."""
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return not func._schema.is_mutable and all(returned.alias_info is None for returned in func._schema.returns)


def _likeness(value):
    """Returns what of an argument decides the layout of a result.

    Raises:
        TypeError: this is not known.
    """
    if isinstance(value, torch.Tensor):
        if not _is_plain(value):  # a number on the CPU, too, which may or may not promote a type
            raise TypeError
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (tuple, list, ItemsView)):
        return tuple(map(_likeness, value))
    if isinstance(value, (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))):
        return type(value), value
    raise TypeError


def _is_plain(value) -> bool:
    """Says whether this is a tensor on the meta device that its shape, its strides and its type describe."""
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return value.is_meta and value.layout is torch.strided and not value.dtype.is_complex and not value.is_quantized
