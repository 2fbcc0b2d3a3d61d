"""The order of tokens around an all-to-all: ``pack`` into blocks by rank, ``unpack`` into global order.

``unpack(x, lengths, P)``: ``x [P, L, ...]`` holds block ``r`` of every segment at ``x[r]``; the result ``[S, ...]`` has
the segments one after the other in global order, without pads.  ``pack(x, lengths, P)`` is the way back; its pad rows
are copies of the segment's last row.  The adjoint of ``unpack`` is ``pack`` with zero pads, that of ``pack`` drops
pads: both only move rows, and no gradient is ever index-added.

Each has two spellings of one meaning: plain tensor operations, which *emit* writes into a compiled graph (Inductor
fuses them into one pass), and an eager one that writes every row once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "pack_eager", "unpack", "unpack_eager"]


def _ceil(n: Any, size: int) -> Any:
    return (n + size - 1) // size


def unpack(x: Tensor, lengths: list[int], size: int) -> Tensor:
    """The meaning of ``unpack``: ``[P, L, ...] -> [S, ...]`` in plain tensor operations."""
    parts = []
    start: Any = 0
    for n in lengths:
        rows = _ceil(n, size)
        part = x.narrow(1, start, rows).reshape(size * rows, *x.shape[2:])
        parts.append(part.narrow(0, 0, n))
        start = start + rows
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack(x: Tensor, lengths: list[int], size: int, zero_pads: bool) -> Tensor:
    """The meaning of ``pack``: ``[S, ...] -> [P, L, ...]`` in plain tensor operations."""
    parts = []
    start: Any = 0
    for n in lengths:
        rows = _ceil(n, size)
        part = x.narrow(0, start, n)
        pads = size * rows - n
        if not isinstance(pads, int):
            part = _padded_by_index(part, n, size * rows, zero_pads)
        elif pads:
            pad = torch.zeros_like(part.narrow(0, 0, 1)) if zero_pads else part.narrow(0, n - 1, 1)
            part = torch.cat([part, pad.expand(pads, *x.shape[1:])])
        parts.append(part.reshape(size, rows, *x.shape[1:]))
        start = start + n
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _padded_by_index(x: Tensor, length: Any, padded: Any, zero_pads: bool) -> Tensor:
    """``x`` with pads up to a symbolic length: no tensor has the number of pads as its size, so none is guarded on."""
    rows = torch.arange(padded, device=x.device)
    result = x.index_select(0, rows.clamp(max=length - 1))
    if not zero_pads:
        return result
    return torch.where((rows < length).view(-1, *(1 for _ in x.shape[1:])), result, 0)


def unpack_eager(x: Tensor, lengths: list[int], size: int) -> Tensor:
    """``unpack``, every row written once."""
    total = sum(lengths)
    if len(lengths) == 1:
        return x.reshape(-1, *x.shape[2:]).narrow(0, 0, total).clone()
    out = x.new_empty(total, *x.shape[2:])
    local = done = 0
    for n in lengths:
        rows = _ceil(n, size)
        full = n // rows if rows else 0
        if full:
            out[done : done + full * rows].view(full, rows, *x.shape[2:]).copy_(x[:full, local : local + rows])
        if n - full * rows:
            out[done + full * rows : done + n].copy_(x[full, local : local + n - full * rows])
        local, done = local + rows, done + n
    return out


def pack_eager(x: Tensor, lengths: list[int], size: int, zero_pads: bool) -> Tensor:
    """``pack``, every row written once."""
    per_rank = [_ceil(n, size) for n in lengths]
    out = x.new_empty(size, sum(per_rank), *x.shape[1:])
    local = done = 0
    for n, rows in zip(lengths, per_rank, strict=True):
        full = n // rows if rows else 0
        part = out[:, local : local + rows]
        if full:
            part[:full].copy_(x[done : done + full * rows].unflatten(0, (full, rows)))
        if full < size:
            rest = n - full * rows
            part[full, :rest].copy_(x[done + full * rows : done + n])
            last = 0.0 if zero_pads else x[done + n - 1]
            part[full, rest:] = last
            part[full + 1 :] = last
        local, done = local + rows, done + n
    return out
