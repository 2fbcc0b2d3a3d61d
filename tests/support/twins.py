"""The twins of the Triton kernels: what each means, every element written once.

They are what the kernels are tested against.  Arguments and results are those of the ops in
:mod:`fxsp.kernels.triton_ops`.

Sizes: B batch, P ranks (blocks), L rows of a block, S rows in global order, D head dimension.  A segment of ``n`` rows
has ``ceil(n / P)`` rows in each block, the last ones pads; one that is ``whole`` has all ``n`` in every block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxsp.kernels.tokens import placed

__all__ = ["pack_heads", "pack_rows", "unpack_heads", "unpack_rows"]


def pack_heads(xs: Sequence[Tensor], rows: int, zero_pads: bool, size: int) -> Tensor:
    """``[B, P h_i, L, D]`` each -> ``[P, rows, B sum of h_i, D]``, rows from L on copies of the last one, or zero."""
    batch, _, length, width = xs[0].shape
    heads = [x.shape[1] // size for x in xs]
    out = xs[0].new_empty(size, rows, batch * sum(heads), width)
    start = 0
    for x, h in zip(xs, heads, strict=True):
        part = out.narrow(2, batch * start, batch * h).unflatten(2, (batch, h))
        part[:, :length].copy_(x.unflatten(1, (size, h)).permute(1, 3, 0, 2, 4))
        if rows > length:
            part[:, length:] = 0.0 if zero_pads else part[:, length - 1 : length]
        start += h
    return out


def unpack_heads(x: Tensor, heads: Sequence[int], length: int) -> Tensor:
    """``[P, rows, B sum of h_i, D]`` -> ``[B, length, P sum of h_i, D]``: all heads of the first tensor come first."""
    size, _, _, width = x.shape
    batch = x.shape[2] // sum(heads)
    out = x.new_empty(batch, length, size * sum(heads), width)
    start = 0
    for h in heads:
        part = out.narrow(2, size * start, size * h).unflatten(2, (size, h))
        own = x[:, :length].narrow(2, batch * start, batch * h).unflatten(2, (batch, h))
        part.copy_(own.permute(2, 1, 0, 3, 4))
        start += h
    return out


def _with_rows(x: Tensor, dim: int, rows: int) -> list[int]:
    """The sizes of ``x [S, *inner]`` with ``rows`` as dimension ``dim`` of a row."""
    inner = list(x.shape[1:])
    return [*inner[:dim], rows, *inner[dim:]]


def pack_rows(
    x: Tensor,
    lengths: Sequence[int],
    whole: Sequence[bool],
    size: int,
    zero_pads: bool,
    rank: int,
    blocks: int,
    dim: int,
) -> Tensor:
    """``x [S, *inner]`` -> those of ``blocks`` ranks from ``rank`` on, ``[blocks, *inner[:dim], L, *inner[dim:]]``.

    Pad rows are copies of the last row of their segment, or zero.
    """
    parts = placed(lengths, whole, size)
    total = sum(p.rows for p in parts)
    result = x.new_empty([blocks, *_with_rows(x, dim, total)])
    out = result.movedim(dim + 1, 1)
    for block in range(blocks):
        for p in parts:
            first = 0 if p.whole else min((rank + block) * p.rows, p.length)
            real = min(p.rows, p.length - first)
            own = out[block, p.row : p.row + p.rows]
            own[:real].copy_(x[p.start + first : p.start + first + real])
            if real < p.rows:
                own[real:] = 0.0 if zero_pads else x[p.start + p.length - 1]
    return result


def unpack_rows(x: Tensor, lengths: Sequence[int], whole: Sequence[bool], size: int, rank: int, dim: int) -> Tensor:
    """``x [P, L, *inner]`` -> ``[*inner[:dim], S, *inner[dim:]]``: the segments in global order, without pads.

    A whole segment is read from the block of ``rank``.
    """
    result = x.new_empty(_with_rows(x[0], dim, sum(lengths)))
    out = result.movedim(dim, 0)
    for p in placed(lengths, whole, size):
        start, n, local, rows = p.start, p.length, p.row, p.rows
        if p.whole:
            out[start : start + n].copy_(x[rank, local : local + n])
            continue
        full = n // rows if rows else 0
        if full:
            blocks = out[start : start + full * rows].unflatten(0, (full, rows))
            blocks.copy_(x[:full, local : local + rows])
        if n > full * rows:
            out[start + full * rows : start + n].copy_(x[full, local : local + n - full * rows])
    return result
