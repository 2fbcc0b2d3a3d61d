"""What the program of one eager call depends on, found in a few microseconds: it is asked of every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fxsp import torch_internals
from fxsp.passes.rules.families import family, names_of
from fxsp.split_values.value import SplitTensor

__all__ = ["computes", "signature"]

#: Leaves of the usual arguments; others are looked at by torch's pytrees.
_LEAVES: frozenset[type] = frozenset(
    [
        *(int, float, bool, complex, str, type(None), type(...), slice, torch.Size),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
        *(Tensor, torch.nn.Parameter, SplitTensor),
    ]
)
_NAMED = {"__getitem__": "index"}


def computes(func: Callable[..., Any], kwargs: Any) -> bool:
    """Whether a call of ``func`` is one of a function of tensors that writes to none."""
    if kwargs and (kwargs.get("out") is not None or kwargs.get("inplace")):
        return False
    return _is_computation(func)


@cache
def _is_computation(func: Any) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace == "aten" and not func._schema.is_mutable and func not in family("same_memory")
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):  # of a property
        return False
    if name.startswith("__i"):
        return name == "__invert__"
    if getattr(func, "__module__", "") == "torch.nn.functional":
        return not name.endswith("_")
    plain = _NAMED.get(name, name.strip("_") if name.startswith("__") else name)
    plain = plain.removeprefix("r") if name.startswith("__r") and name != "__rshift__" else plain
    if plain.endswith("_") or plain.startswith("is_") or plain in names_of("same_memory"):
        return False
    return hasattr(torch.ops.aten, plain)


#: What a quick signature has beside tensors.
_SCALARS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.Size])


def quick_signature(func: Any, args: Any) -> tuple[Any, list[Tensor]]:
    """As :func:`signature` of a call without containers and names, for the price of a loop; ``(None, [])``: of another.

    Two calls have equal ones only if their signatures are equal.
    """
    grad = torch.is_grad_enabled()
    key: list[Any] = [func, grad]
    tensors: list[Tensor] = []
    if torch_internals.any_autocast():
        return None, tensors
    for x in args:
        kind = type(x)
        if kind is SplitTensor:
            same = x._kind
            if same is None or type(x._rows.local) is not Tensor:
                return None, tensors
            key.append(same)
        elif kind is Tensor or kind is torch.nn.Parameter:
            if not torch_internals.is_plain_tensor(x):
                return None, tensors
            key += (x.dtype, x.device, x.shape, x.stride())
        elif kind in _SCALARS:
            key += (kind, x)
            continue
        else:
            return None, tensors
        if grad:
            key.append(x.requires_grad)
        tensors.append(x)
    return tuple(key), tensors


def signature(func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]] | None:
    """``(key, tensors)``: equal for two calls that have one program; None where a call is none of one graph."""
    grad = torch.is_grad_enabled()
    begin = [func, torch_internals.autocast_state(), grad]
    key: list[Any] = [*begin]
    tensors: list[Tensor] = []
    try:
        try:
            _describe(args, key, tensors, grad)
            if kwargs:
                _describe(kwargs, key, tensors, grad)
        except _OtherLeafError:
            leaves, structure = tree_flatten((args, kwargs))
            key, tensors = [*begin, structure], []
            _describe(leaves, key, tensors, grad, flat=True)
    except _NoGraphError:
        return None
    if len(tensors) > 1:
        first = None
        for x in tensors:
            if type(x) is SplitTensor:
                ranks = x.placed.ranks
                if first is None:
                    first = ranks
                elif ranks is not first and ranks != first:
                    return None
    return tuple(key), tensors


class _OtherLeafError(Exception):
    """A container that is no list, tuple or dictionary, or a leaf that is not known."""


class _NoGraphError(Exception):
    """A tensor that no program takes."""


def _describe(items: Any, key: list[Any], tensors: list[Tensor], grad: bool, *, flat: bool = False) -> None:
    """Append what is in a container to ``key``, in one pass; ``flat``: what is not known in it is a leaf."""
    kind = type(items)
    key.append(kind)
    key.append(len(items))
    if kind is dict:
        key.extend(items)
        items = items.values()
    for x in items:
        kind = type(x)
        if kind is SplitTensor:
            if type(x._rows.local) is not Tensor:
                raise _NoGraphError
            same = x._kind or x.kind()
            if not same.dtype.is_floating_point:
                raise _NoGraphError
            key.append(same)
            key.append(grad and x.requires_grad)
            tensors.append(x)
        elif kind in _LEAVES:
            if kind is Tensor or kind is torch.nn.Parameter:
                if not torch_internals.is_plain_tensor(x):
                    raise _NoGraphError
                key += (Tensor, x.dtype, x.device, x.shape, x.stride(), grad and x.requires_grad)
                tensors.append(x)
            elif kind is slice:  # which has no hash
                key += (kind, x.start, x.stop, x.step)
            else:
                key += (kind, x)
        elif isinstance(x, Tensor):
            raise _NoGraphError
        elif flat:
            key += (kind, x)
        elif kind is tuple or kind is list or kind is dict:
            _describe(x, key, tensors, grad)
        else:
            raise _OtherLeafError
