"""``fxsp.pack_heads`` and ``fxsp.unpack_heads`` as operators, each the adjoint of the other (on what is no pad).

``fuse`` changes no value: it asks that a compiler gets plain operations to fuse with what is before or behind them,
instead of a kernel of ours (see :mod:`fxsp.passes.accounting.device_memory`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.counts import moved
from fxsp.kernels.exchange import exchange
from fxsp.kernels.op import Op, Saved

__all__ = ["HEADS"]


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
        "pack_heads", "(Tensor[] xs, SymInt rows, bool zero_pads, int size, bool fuse) -> Tensor", exchange.pack_heads,
        "S -> S", Saved(_pack_setup, _pack_backward), _pack_fake, moves=moved,
    ),
    Op(
        "unpack_heads", "(Tensor x, int[] heads, SymInt length, bool fuse) -> Tensor", exchange.unpack_heads,
        "S -> S", Saved(_unpack_setup, _unpack_backward), _unpack_fake, moves=moved,
    ),
)  # fmt: skip
