"""Maxima and minima over ranks, and what their gradients go to.

``fxsp.all_reduce_extreme`` is an all-reduce whose operation is ``"max"`` or ``"min"``.  A maximum that is not a number
is not a number, as torch has it; what a communication library makes of a NaN is its own affair, so floating values
travel as integers in the same order, where a NaN is the last (or first) of all.  Bools travel as bytes.

``fxsp.at_extreme`` is a reduced value that is whole on every rank (``value``), as a function of the shards ``x`` that
it was found in: the identity of ``value`` forward, and backward the gradient goes to the elements of ``hit``, in equal
parts where there may be several (``ties``, as ``amax`` has it; their number is summed over the ranks). Nothing goes to
``value`` and ``hit``, nor through ``all_reduce_extreme``, whose operand (one value for each rank) is detached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.counts import reduced_bytes
from fxsp.kernels.op import Gradient, Local, Op, Saved, Sent, Sizes
from fxsp.types import Length, ceil_div, product

__all__ = ["EXTREMES", "travels_as"]

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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, hit, *ctx.rest = inputs
    ctx.save_for_backward(hit)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (hit,) = ctx.saved_tensors
    return torch.ops.fxsp.at_extreme_backward(grad, hit, *ctx.rest), None, None, *(None for _ in ctx.rest)


def _sent(call: Sizes) -> Length:
    x: Local = call["x"]
    return ceil_div(product((*x.shape, travels_as(x.dtype).itemsize, 2 * (call.size - 1))), call.size)


def _counts_sent(call: Sizes) -> Length:
    return reduced_bytes(product(call["grad"].shape), torch.int32, call.size) if call["ties"] else 0


def _counts_returned(call: Gradient) -> Iterator[Sent]:
    if call.argument("ties"):
        sent = reduced_bytes(product(call.value().shape), torch.int32, call.size)
        yield Sent("all_reduce", sent, "how many elements on all ranks share a gradient")


_HOW = "int[] dims, bool keepdim, bool ties, str group"
EXTREMES = (
    Op("all_reduce_extreme", "(Tensor x, str op, str group) -> Tensor", all_reduce_extreme, "R -> R", sends=_sent),
    Op(
        "at_extreme", f"(Tensor x, Tensor value, Tensor hit, {_HOW}) -> Tensor", at_extreme, "S, R -> R",
        Saved(_setup, _backward), returns=_counts_returned,
    ),
    Op(
        "at_extreme_backward", f"(Tensor grad, Tensor hit, {_HOW}) -> Tensor", at_extreme_backward, "R -> S+",
        sends=_counts_sent,
    ),
)  # fmt: skip
