"""Maxima and minima over ranks, and what their gradients go to.

``fxsp.all_reduce_extreme`` is an all-reduce whose operation is ``"max"`` or ``"min"``.  A maximum that is not a number
is not a number, as torch has it; what a communication library makes of a NaN is its own affair, so floating values
travel as integers in the same order, where a NaN is the last (or first) of all.  Bools travel as bytes.

``fxsp.at_extreme`` is a reduced value that is whole on every rank (``value``), as a function of the shards ``x`` that
it was found in: the identity of ``value`` forward, and backward the gradient goes to the elements of ``hit``, in equal
parts where there may be several (``ties``, as ``amax`` has it; their number is summed over the ranks).

====================== =========== ====================================================================================
op                     types       backward
====================== =========== ====================================================================================
all_reduce_extreme     R' -> R     none: its operand (one value for each rank) is detached
at_extreme             S, R -> R   at_extreme_backward of ``x``, nothing of the others
at_extreme_backward    R -> S+     none
====================== =========== ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives

__all__ = ["EXTREMES", "EXTREME_OPS", "register", "travels_as"]

#: Name of an op -> its schema.
EXTREME_OPS: dict[str, str] = {
    "all_reduce_extreme": "(Tensor x, str op, str group) -> Tensor",
    "at_extreme": "(Tensor x, Tensor value, Tensor hit, int[] dims, bool keepdim, bool ties, str group) -> Tensor",
    "at_extreme_backward": "(Tensor grad, Tensor hit, int[] dims, bool keepdim, bool ties, str group) -> Tensor",
}

#: Integers as wide as the floating values whose order they keep.
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
#: Dtypes that every communication library compares.
_PLAIN = (torch.uint8, torch.int8, torch.int32, torch.int64)


def travels_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a maximum of values of ``dtype`` travels."""
    if dtype.is_floating_point:
        return _BITS[torch.promote_types(dtype, torch.float32)]
    if dtype == torch.bool:
        return torch.uint8
    return dtype if dtype in _PLAIN else torch.int32


def _flipped(bits: Tensor) -> Tensor:
    """Bits of floating values as integers in the same order, and back: negative ones run the other way."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _key(x: Tensor, op: str) -> Tensor:
    if not x.dtype.is_floating_point:
        return x.to(travels_as(x.dtype))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dtype = travels_as(x.dtype)
    limits = torch.iinfo(dtype)
    last = limits.max if op == "max" else limits.min
    return _flipped(wide.view(dtype)).masked_fill(wide.isnan(), last)


def _value(key: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return key.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # The first and the last integer are no numbers as bits, either.
    return _flipped(key).view(wide).to(dtype)


def all_reduce_extreme(x: Tensor, op: str, group: str) -> Tensor:
    """The elementwise maximum or minimum over the ranks, contiguous."""
    if not group:
        return x
    return _value(collectives.all_reduce_as(_key(x, op).contiguous(), op, group), x.dtype)


def at_extreme(
    x: Tensor, value: Tensor, hit: Tensor, dims: Sequence[int], keepdim: bool, ties: bool, group: str
) -> Tensor:
    return value


def at_extreme_backward(
    grad: Tensor, hit: Tensor, dims: Sequence[int], keepdim: bool, ties: bool, group: str
) -> Tensor:
    for dim in () if keepdim else sorted(dims):
        grad = grad.unsqueeze(dim)
    grad = grad * hit
    if not ties:
        return grad
    count = hit.sum(list(dims), True, dtype=torch.int32)
    return grad / (collectives.all_reduce(count, group) if group else count)


EXTREMES: dict[str, Callable[..., Any]] = {
    "all_reduce_extreme": all_reduce_extreme,
    "at_extreme": at_extreme,
    "at_extreme_backward": at_extreme_backward,
}


def _fresh(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator may not return its operand."""

    def eager(*args: Any) -> Tensor:
        result = run(*args)
        given = [a for a in args if isinstance(a, Tensor)]
        aliases = any(a.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() for a in given)
        return result.clone() if aliases else result

    return eager


def _contiguous_fake(x: Tensor, op: str, group: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _value_fake(x: Tensor, value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


def _grad_fake(grad: Tensor, hit: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hit, dtype=grad.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, hit, *ctx.rest = inputs
    ctx.save_for_backward(hit)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (hit,) = ctx.saved_tensors
    return torch.ops.fxsp.at_extreme_backward(grad, hit, *ctx.rest), None, None, *(None for _ in ctx.rest)


def register(library: torch.library.Library) -> None:
    """Define the operators."""
    fakes: dict[str, Callable[..., Tensor]] = {
        "all_reduce_extreme": _contiguous_fake,
        "at_extreme": _value_fake,
        "at_extreme_backward": _grad_fake,
    }
    for name, schema in EXTREME_OPS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, _fresh(EXTREMES[name]), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{name}", fakes[name], lib=library)
    torch.library.register_autograd("fxsp::at_extreme", _backward, setup_context=_setup, lib=library)
