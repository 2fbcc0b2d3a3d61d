"""Tokens for heads among consecutive ranks, on split tokens in eager mode, and back: among all (Ulysses), or among the
``u`` ranks of one place of a ring, whose rows all stay then, pads included.

Segments that every rank has stay at home: each rank keeps the rows of its own heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsp.hooks.layout import Layout, local_size, same_tokens, segments
from fxsp.hooks.region import Region
from fxsp.kernels.ops import fxsp_ops as _ops

__all__ = ["to_heads", "to_tokens"]


def to_heads(q: Tensor, k: Tensor, v: Tensor, lq: Layout, lk: Layout, u: int) -> list[Tensor]:
    """``[B, H, L, D]`` each, split by tokens -> ``[B, H/u, S, D]`` each, split by heads.

    One all-to-all where q, k and v can travel together.
    """
    if same_tokens(lq, lk) and q.shape[-1] == v.shape[-1]:
        return _to_heads([q, k, v], lq, u)
    if k.shape[-1] == v.shape[-1]:
        return [*_to_heads([q], lq, u), *_to_heads([k, v], lk, u)]
    return [*_to_heads([q], lq, u), *_to_heads([k], lk, u), *_to_heads([v], lk, u)]


def _to_heads(tensors: list[Tensor], layout: Layout, u: int) -> list[Tensor]:
    region, parts, counts = layout.region, segments(layout), _counts(layout, u)
    heads = [x.shape[1] // u for x in tensors]
    packed = torch.cat([x.unflatten(1, (u, -1)).permute(1, 3, 0, 2, 4) for x in tensors], 3)  # [u, L, B, h, D]
    sent = packed
    if any(layout.whole):
        sent = torch.cat([packed.narrow(1, at, rows) for at, rows, _, whole in parts if not whole], 1)
    split = [n for n, whole in zip(counts, layout.whole, strict=True) if not whole]
    tokens = _ops.unpack.default(_exchange(sent, region, u), split, u)
    if any(layout.whole):
        pieces, start = [], 0
        for (at, rows, _, whole), n in zip(parts, counts, strict=True):
            if whole:
                own = _ops.take.default(packed.narrow(1, at, rows), 0, region.rank % u, u)
                pieces.append(own.squeeze(0))
            else:
                pieces.append(tokens.narrow(0, start, n))
                start = start + n
        tokens = torch.cat(pieces)
    return list(tokens.permute(1, 2, 0, 3).split(heads, 1))


def to_tokens(out: Tensor, layout: Layout, u: int) -> Tensor:
    """``[B, H/u, S, D]`` split by heads -> ``[B, H, L, D]`` split by tokens; one all-to-all."""
    tokens, counts = out.permute(2, 0, 1, 3), _counts(layout, u)
    if any(layout.whole):  # rows of whole segments go to everyone
        blocks, start = [], 0
        for n, whole in zip(counts, layout.whole, strict=True):
            rows = tokens.narrow(0, start, n)
            start = start + n
            blocks.append(rows.expand(u, *rows.shape) if whole else _ops.pack.default(rows, [n], u, False))
        packed = torch.cat(blocks, 1)
    else:
        packed = _ops.pack.default(tokens, counts, u, False)
    received = _exchange(packed, layout.region, u)  # [u, L, B, h, D]: the heads of each rank
    result = received.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)
    assert result.shape[2] == local_size(layout)
    return result


def _counts(layout: Layout, u: int) -> list[int]:
    """Rows of each segment in between: all its tokens, or what the ranks of a place have of them."""
    if u == layout.region.size:
        return list(layout.lengths)
    return [n if whole else u * rows for _, rows, n, whole in segments(layout)]


def _exchange(x: Tensor, region: Region, u: int) -> Tensor:
    if u == region.size:
        y: Tensor = _ops.all_to_all.default(x.contiguous(), region.group)
    else:
        y = _ops.all_to_all_within.default(x.contiguous(), region.rank, region.size, region.group)
    return y
