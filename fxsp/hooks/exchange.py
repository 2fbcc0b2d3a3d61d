"""Tokens for heads among consecutive ranks, on split tokens in eager mode, and back: among all (Ulysses), or among the
``u`` ranks of one place of a ring, whose rows all stay then, pads included.

Segments that every rank has stay at home: each rank keeps the rows of its own heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsp.hooks.layout import Layout, same_tokens, segments
from fxsp.hooks.region import Region
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.kernels.tokens import Part

__all__ = ["to_heads", "to_tokens"]


def to_heads(q: Tensor, k: Tensor, v: Tensor, lq: Layout, lk: Layout, u: int) -> list[Tensor]:
    """``[B, H, L, D]`` each, split by tokens -> ``[B, H/u, S, D]`` each, split by heads.

    One all-to-all where q, k and v can travel together.
    """
    if k.shape[-1] != v.shape[-1]:
        return [y for x, layout in ((q, lq), (k, lk), (v, lk)) for y in _to_heads([x], layout, u)]
    if same_tokens(lq, lk):
        return _to_heads([q, k, v], lq, u)
    return [*_to_heads([q], lq, u), *_to_heads([k, v], lk, u)]


def _to_heads(tensors: list[Tensor], layout: Layout, u: int) -> list[Tensor]:
    region, parts = layout.region, segments(layout)
    heads = [x.shape[1] // u for x in tensors]
    packed = torch.cat([x.unflatten(1, (u, -1)).permute(1, 3, 0, 2, 4) for x in tensors], 3)  # [u, L, B, h, D]
    sent, some = packed, any(layout.whole)
    if some:
        sent = torch.cat([packed.narrow(1, part.row, part.rows) for part in parts if not part.whole], 1)
    split = [_count(part, u) for part in parts if not part.whole]
    tokens = _ops.unpack.default(_exchange(sent, region, u), split, u)
    if some:
        moved = iter(tokens.split(split))
        own = _ops.take.default(packed, 0, region.rank % u, u).squeeze(0)
        tokens = torch.cat([own.narrow(0, part.row, part.rows) if part.whole else next(moved) for part in parts])
    return list(tokens.permute(1, 2, 0, 3).split(heads, 1))


def to_tokens(out: Tensor, layout: Layout, u: int) -> Tensor:
    """``[B, H/u, S, D]`` split by heads -> ``[B, H, L, D]`` split by tokens; one all-to-all."""
    tokens, parts = out.permute(2, 0, 1, 3), segments(layout)
    counts = [_count(part, u) for part in parts]
    if any(layout.whole):  # rows of whole segments go to everyone
        blocks = [
            rows.expand(u, *rows.shape) if part.whole else _ops.pack.default(rows, [n], u, False)
            for part, n, rows in zip(parts, counts, tokens.split(counts), strict=True)
        ]
        packed = torch.cat(blocks, 1)
    else:
        packed = _ops.pack.default(tokens, counts, u, False)
    received = _exchange(packed, layout.region, u)  # [u, L, B, h, D]: the heads of each rank
    return received.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def _count(part: Part, u: int) -> int:
    """Rows of a segment in between: all its tokens, or what the ranks of a place have of them."""
    return part.length if u == part.size or part.whole else u * part.rows  # type: ignore[no-any-return]


def _exchange(x: Tensor, region: Region, u: int) -> Tensor:
    if u == region.size:
        y: Tensor = _ops.all_to_all.default(x.contiguous(), region.group)
    else:
        y = _ops.all_to_all_within.default(x.contiguous(), region.rank, region.size, region.group)
    return y
