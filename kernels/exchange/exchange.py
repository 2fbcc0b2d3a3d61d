"""The order of tokens and heads around an all-to-all, as *emit* writes it: what the four ops that reorder mean.

``pack(x, lengths, P)``: ``x [S, ...]``, the segments one after the other in global order, becomes ``[P, L, ...]``:
block ``r`` of every segment at ``[r]``.  Pad rows are copies of the segment's last row.  ``unpack`` is the way back,
and drops pads.  ``pack_heads(xs, rows, P)``: of q, k, v ``[B, P h, L, D]`` (each with its own ``h``), all that rank
``r`` shall have, side by side in one buffer ``[P, rows, B sum of h, D]``: of each row the heads of q for all batch
entries, then those of k, then those of v, so that each tensor is one run of heads.  ``unpack_heads`` is the way back,
as ``[B, L, P sum of h, D]`` with all heads of q first: what a linear layer reads, of one tensor.

The adjoint of a way back is ``pack`` with zero pads, that of ``pack`` drops pads: all four only move elements, and no
gradient is ever index-added.

On CUDA each is one Triton kernel, and so one pass over memory.  On a CPU it is plain tensor operations, which Inductor
fuses into one pass; so it is on CUDA for a compiler where ``fuse`` is set, which then fuses what makes the operands as
well (see :mod:`fxsp.passes.accounting.device_memory`); it changes no value.  Where strides suffice (one segment without
pads) it is a view on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.counts import moved
from fxsp.kernels.exchange import place
from fxsp.kernels.op import Op, Saved
from fxsp.kernels.rows import along, joined
from fxsp.kernels.tokens import placed
from fxsp.types import as_length, same_length

__all__ = ["HEADS", "pack", "pack_heads", "unpack", "unpack_heads"]


def _same(a: Any, b: Any) -> bool:
    return same_length(as_length(a), as_length(b))


def unpack(x: Tensor, lengths: list[int], size: int) -> Tensor:
    """``[P, L, ...] -> [S, ...]``."""
    movers = place.kernels(x, x.shape[2:]) if len(lengths) > 1 else None
    if movers is not None:
        return movers.unpack_rows(x, lengths, [False] * len(lengths), size, 0, 0)  # type: ignore[no-any-return]
    parts = []
    for p in placed(lengths, [False] * len(lengths), size):
        rows = x.narrow(1, p.row, p.rows).reshape(size * p.rows, *x.shape[2:])
        parts.append(rows.narrow(0, 0, p.length))
    return joined(parts, 0)


def pack(x: Tensor, lengths: list[int], size: int, zero_pads: bool) -> Tensor:
    """``[S, ...] -> [P, L, ...]``."""
    padded = len(lengths) > 1 or not isinstance(lengths[0], int) or lengths[0] % size
    movers = place.kernels(x, x.shape[1:]) if padded else None
    if movers is not None:
        whole = [False] * len(lengths)
        return movers.pack_rows(x, lengths, whole, size, zero_pads, 0, size, 0)  # type: ignore[no-any-return]
    parts = []
    for p in placed(lengths, [False] * len(lengths), size):
        rows = _padded(x.narrow(0, p.start, p.length), 0, size * p.rows, zero_pads)
        parts.append(rows.reshape(size, p.rows, *x.shape[1:]))
    return joined(parts, 1)


def _padded(x: Tensor, dim: int, rows: Any, zero_pads: bool) -> Tensor:
    """``x`` with pads up to ``rows``; of symbolic lengths by index, lest a number of pads be guarded on."""
    length = x.shape[dim]
    pads = rows - length
    if isinstance(pads, int):
        if not pads:
            return x
        shape = [pads if i == dim else n for i, n in enumerate(x.shape)]
        pad = torch.zeros_like(x.narrow(dim, 0, 1)) if zero_pads else x.narrow(dim, length - 1, 1)
        return torch.cat([x, pad.expand(shape)], dim)
    index = torch.arange(rows, device=x.device)
    result = x.index_select(dim, index.clamp(max=length - 1))
    if not zero_pads:
        return result
    return torch.where((index < length).view(along(x, dim)), result, 0)


def pack_heads(xs: Sequence[Tensor], rows: Any, zero_pads: bool, size: int, fuse: bool = False) -> Tensor:
    """``[B, P h_i, L, D]`` each ``-> [P, rows, B sum of h_i, D]``."""
    movers = place.kernels(xs[0], xs[0].shape[3:]) if len(xs) <= place.TENSORS and not fuse else None
    if movers is not None:
        return movers.pack_heads(list(xs), rows, zero_pads, size)  # type: ignore[no-any-return]
    parts = []
    for x in xs:
        if not _same(rows, x.shape[2]):
            x = _padded(x, 2, rows, zero_pads)
        parts.append(x.unflatten(1, (size, x.shape[1] // size)).permute(1, 3, 0, 2, 4).flatten(2, 3))
    # Permuted first, then joined, so that the buffer is written once.
    return joined(parts, 2).contiguous()


def unpack_heads(x: Tensor, heads: Sequence[int], length: Any, fuse: bool = False) -> Tensor:
    """``[P, rows, B sum of h_i, D] -> [B, length, P sum of h_i, D]``."""
    movers = place.kernels(x, x.shape[3:]) if len(heads) <= place.TENSORS and not fuse else None
    if movers is not None:
        return movers.unpack_heads(x, list(heads), length)  # type: ignore[no-any-return]
    if not _same(length, x.shape[1]):
        x = x.narrow(1, 0, length)
    batch = x.shape[2] // sum(heads)
    parts = [
        part.unflatten(2, (batch, h)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        for h, part in zip(heads, x.split([batch * h for h in heads], 2), strict=True)
    ]
    return joined(parts, 2).contiguous()


# As operators, each the adjoint of the other (on what is no pad).


def _pack_fake(xs: list[Tensor], rows: Any, zero_pads: bool, size: int, fuse: bool) -> Tensor:
    batch, _, _, width = xs[0].shape
    return xs[0].new_empty([size, rows, batch * sum(x.shape[1] // size for x in xs), width])


def _unpack_fake(x: Tensor, heads: list[int], length: Any, fuse: bool) -> Tensor:
    size, _, all_heads, width = x.shape
    return x.new_empty([all_heads // sum(heads), length, size * sum(heads), width])


def _apart(x: Tensor, heads: list[int], size: int) -> list[Tensor]:
    """``[B, L, P sum of h_i, D]`` -> ``[B, P h_i, L, D]`` each, views."""
    return [part.transpose(1, 2) for part in x.split([size * h for h in heads], 2)]


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, _, _, ctx.size, ctx.fuse = inputs
    ctx.heads, ctx.length, ctx.batch = [x.shape[1] // ctx.size for x in xs], xs[0].shape[2], xs[0].shape[0]


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    unpack = torch.ops.fxsp.unpack_heads
    if ctx.fuse:
        # Each by itself: what comes behind reads its own part of the buffer.
        own = zip(ctx.heads, grad.split([ctx.batch * h for h in ctx.heads], 2), strict=True)
        return [unpack(part, [h], ctx.length, True).transpose(1, 2) for h, part in own], None, None, None, None
    whole = unpack(grad, ctx.heads, ctx.length, False)
    return _apart(whole, ctx.heads, ctx.size), None, None, None, None


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.heads, _, ctx.fuse = inputs
    ctx.size, ctx.rows = x.shape[:2]


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = _apart(grad, ctx.heads, ctx.size)
    return torch.ops.fxsp.pack_heads(parts, ctx.rows, True, ctx.size, ctx.fuse), None, None, None


HEADS = (
    Op(
        "pack_heads", "(Tensor[] xs, SymInt rows, bool zero_pads, int size, bool fuse) -> Tensor", pack_heads,
        "S -> S", Saved(_pack_setup, _pack_backward), _pack_fake, moves=moved,
    ),
    Op(
        "unpack_heads", "(Tensor x, int[] heads, SymInt length, bool fuse) -> Tensor", unpack_heads,
        "S -> S", Saved(_unpack_setup, _unpack_backward), _unpack_fake, moves=moved,
    ),
)  # fmt: skip
