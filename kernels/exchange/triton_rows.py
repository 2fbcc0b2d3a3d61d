"""Triton: rows into blocks by rank and back into global order (see :mod:`fxsp.kernels.exchange.exchange` for the
meaning).

Imported only where a kernel is wanted: a CPU build of torch has no Triton.

A row has the inner dimensions A, H, D with any strides on both sides, so that the same two kernels also turn what an
all-gather along a middle dimension brings, ``[P, A, L, D]``, into ``[A, S, D]`` in the pass that drops the pads.  Up to
four segments are moved by one launch; their lengths are run-time integers.  Bit ``i`` of WHOLE: segment ``i`` lies
entire in every block.  ``o_`` is an offset, ``m_`` a mask; strides come in units of UNIT elements.
"""

# Triton reads the signatures: a plain name is a run-time argument.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pack_rows_kernel", "unpack_rows_kernel"]


@triton.jit
def _inner(e, sa, sh, sd, H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of the elements ``e`` of a row."""
    a = (e // (H * D)).to(tl.int64)
    h = ((e // D) % H).to(tl.int64)
    return a * (sa * UNIT) + h * (sh * UNIT) + (e % D).to(tl.int64) * sd


@triton.jit
def _from_block(row, p, at, start, local, n, size, rank, ENTIRE: tl.constexpr):
    """Block, and row in it, of the rows of one segment, the others as they were; where the next segment begins."""
    j = row - start
    m = (j >= 0) & (j < n)
    if ENTIRE:
        p = tl.where(m, rank, p)
        at = tl.where(m, local + j, at)
        local += n
    else:
        each = (n + size - 1) // size
        p = tl.where(m, j // tl.maximum(each, 1), p)
        at = tl.where(m, local + j % tl.maximum(each, 1), at)
        local += each
    return p, at, start + n, local


@triton.jit(do_not_specialize=["A", "size", "rank", "first", "local", "n0", "n1", "n2", "n3"])
def unpack_rows_kernel(
    x, out, xp, xl, xa, xh, xd, ol, oa, oh, od, A, size, rank, first, local, n0, n1, n2, n3,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``x [P, L, A, H, D]`` -> rows ``first ...`` of ``out [S, A, H, D]``: those of four segments, without pads.

    The segments have ``n0 .. n3`` rows (0: none) and begin at ``local`` in a block.  An entire one is read from the
    block of ``rank``.  Grid: (tiles of rows, chunks of a row).
    """
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    p = tl.zeros_like(row)
    at = tl.zeros_like(row)
    p, at, start, local = _from_block(row, p, at, 0, local, n0, size, rank, WHOLE & 1)
    p, at, start, local = _from_block(row, p, at, start, local, n1, size, rank, WHOLE & 2)
    p, at, start, local = _from_block(row, p, at, start, local, n2, size, rank, WHOLE & 4)
    p, at, start, local = _from_block(row, p, at, start, local, n3, size, rank, WHOLE & 8)
    m = (row < n0 + n1 + n2 + n3)[:, None] & (e < A * (H * D))[None, :]
    o_x = p.to(tl.int64) * (xp * UNIT) + at.to(tl.int64) * (xl * UNIT)
    o_out = (first + row).to(tl.int64) * (ol * UNIT)
    values = tl.load(x + o_x[:, None] + _inner(e, xa, xh, xd, H, D, UNIT)[None, :], mask=m, other=0.0)
    tl.store(out + o_out[:, None] + _inner(e, oa, oh, od, H, D, UNIT)[None, :], values, mask=m)


@triton.jit
def _to_block(i, source, real, p, start, local, n, size, ENTIRE: tl.constexpr):
    """The global row of the rows of one segment, the last one for pads; the others as they were."""
    each = n if ENTIRE else (n + size - 1) // size
    j = i - local
    m = (j >= 0) & (j < each)
    if not ENTIRE:
        j += p * each
    source = tl.where(m, start + tl.minimum(j, n - 1), source)
    real = tl.where(m, j < n, real)
    return source, real, start + n, local + each


@triton.jit(do_not_specialize=["A", "size", "rank", "rows", "first", "local", "n0", "n1", "n2", "n3"])
def pack_rows_kernel(
    x, out, xl, xa, xh, xd, op, ol, oa, oh, od, A, size, rank, rows, first, local, n0, n1, n2, n3,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``x [S, A, H, D]`` -> the blocks ``out [.., L, A, H, D]`` of the ranks from ``rank`` on: rows of four segments.

    The segments have ``n0 .. n3`` rows (0: none), ``rows`` together in a block, and begin at ``first`` in ``x`` and at
    ``local`` in a block.  Pad rows are copies of the last row of their segment, or zero.
    Grid: (tiles of rows of a block, chunks of a row, blocks).
    """
    i = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    block = tl.program_id(2)
    p = rank + block
    source = tl.zeros_like(i)
    real = i < 0
    source, real, start, at = _to_block(i, source, real, p, first, 0, n0, size, WHOLE & 1)
    source, real, start, at = _to_block(i, source, real, p, start, at, n1, size, WHOLE & 2)
    source, real, start, at = _to_block(i, source, real, p, start, at, n2, size, WHOLE & 4)
    source, real, start, at = _to_block(i, source, real, p, start, at, n3, size, WHOLE & 8)
    m_out = (i < rows)[:, None] & (e < A * (H * D))[None, :]
    m_x = m_out & real[:, None] if ZERO else m_out
    o_x = source.to(tl.int64) * (xl * UNIT)
    o_out = block.to(tl.int64) * (op * UNIT) + (local + i).to(tl.int64) * (ol * UNIT)
    values = tl.load(x + o_x[:, None] + _inner(e, xa, xh, xd, H, D, UNIT)[None, :], mask=m_x, other=0.0)
    tl.store(out + o_out[:, None] + _inner(e, oa, oh, od, H, D, UNIT)[None, :], values, mask=m_out)
