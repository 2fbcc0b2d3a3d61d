"""Triton: heads to blocks by rank and back (see :mod:`fxsp.kernels.exchange.exchange` for the meaning, its reference).

Imported only where a kernel is wanted: a CPU build of torch has no Triton.

Sizes: B batch, L tokens (rows), P ranks, H heads of one tensor on one rank, D head dimension.  Prefixes: ``o_`` offset,
``m_`` mask.  A program moves a tile of tokens x elements of one tensor, for one rank and one batch entry.  The element
axis is the flat ``(h, d)``, contiguous in memory on the packed side, so that lanes do not idle on a D that is no power
of two.  Strides come in units of UNIT elements: that they are multiples of it is then known to the compiler, which
moves 16 bytes at a time.  Sizes that change from call to call are never specialised on.
"""

# Triton reads the signatures: a plain name is a run-time argument.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pack_heads_kernel", "unpack_heads_kernel"]


@triton.jit
def _send(
    x, xb, xh, xl, xd, out, o_out, p, b, chunk, row, length, rows,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The tile of one tensor; ``o_out[row]`` is where the tensor's elements of a token begin."""
    e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    head = (p * H + e // D).to(tl.int64)
    o_x = b.to(tl.int64) * (xb * UNIT) + head * (xh * UNIT) + (e % D).to(tl.int64) * xd
    m_out = (row < rows)[:, None] & (e < H * D)[None, :]
    source = tl.minimum(row, length - 1).to(tl.int64) * (xl * UNIT)
    m_x = m_out & (row < length)[:, None] if ZERO else m_out
    values = tl.load(x + source[:, None] + o_x[None, :], mask=m_x, other=0.0)
    tl.store(out + o_out[:, None] + e[None, :], values, mask=m_out)


@triton.jit(do_not_specialize=["batch", "length", "rows"])
def pack_heads_kernel(
    q, k, v, out, qb, qh, ql, qd, kb, kh, kl, kd, vb, vh, vl, vd, batch, length, rows,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, ZERO: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``q, k, v [B, P H, length, D]`` -> ``out [P, rows, B (HQ + HK + HV), D]``; a tensor with no heads is absent.

    Of a row, first come the heads of q for all batch entries, then those of k, then those of v.

    Rows from ``length`` on are copies of the last one, or zero.
    Grid: (tiles of rows, P * B, chunks of q + chunks of k + chunks of v).
    """
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    p = tl.program_id(1) // batch
    b = tl.program_id(1) % batch
    chunk = tl.program_id(2)
    o_out = (p.to(tl.int64) * rows + row) * batch * ((HQ + HK + HV) * D)
    QS: tl.constexpr = (HQ * D + BLOCK_E - 1) // BLOCK_E
    KS: tl.constexpr = (HK * D + BLOCK_E - 1) // BLOCK_E
    if chunk < QS:
        o_q = o_out + b * (HQ * D)
        _send(q, qb, qh, ql, qd, out, o_q, p, b, chunk, row, length, rows, HQ, D, UNIT, ZERO, BLOCK_E)
    elif chunk < QS + KS:
        o_k = o_out + batch * (HQ * D) + b * (HK * D)
        _send(k, kb, kh, kl, kd, out, o_k, p, b, chunk - QS, row, length, rows, HK, D, UNIT, ZERO, BLOCK_E)
    else:
        o_v = o_out + batch * ((HQ + HK) * D) + b * (HV * D)
        _send(v, vb, vh, vl, vd, out, o_v, p, b, chunk - QS - KS, row, length, rows, HV, D, UNIT, ZERO, BLOCK_E)


@triton.jit
def _receive(
    x, o_x, xh, xd, out, o_out, chunk, row, length, first,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The tile of one tensor: heads ``first ...`` of a token of ``x`` to ``o_out[row] ...``."""
    e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    head = (first + e // D).to(tl.int64)
    m = (row < length)[:, None] & (e < H * D)[None, :]
    o_e = head * (xh * UNIT) + (e % D).to(tl.int64) * xd
    values = tl.load(x + o_x[:, None] + o_e[None, :], mask=m, other=0.0)
    tl.store(out + o_out[:, None] + e[None, :], values, mask=m)


@triton.jit(do_not_specialize=["batch", "size", "length"])
def unpack_heads_kernel(
    x, out, xp, xl, xh, xd, batch, size, length,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``x [P, rows, B (HQ + HK + HV), D]`` -> ``out [B, length, P HQ + P HK + P HV, D]``, contiguous; other rows drop.

    Grid: (tiles of rows, P * B, chunks of q + chunks of k + chunks of v).
    """
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    p = tl.program_id(1) // batch
    b = tl.program_id(1) % batch
    chunk = tl.program_id(2)
    o_x = p.to(tl.int64) * (xp * UNIT) + row.to(tl.int64) * (xl * UNIT)
    o_out = (b.to(tl.int64) * length + row) * size * ((HQ + HK + HV) * D)
    QS: tl.constexpr = (HQ * D + BLOCK_E - 1) // BLOCK_E
    KS: tl.constexpr = (HK * D + BLOCK_E - 1) // BLOCK_E
    if chunk < QS:
        o_q = o_out + p * (HQ * D)
        _receive(x, o_x, xh, xd, out, o_q, chunk, row, length, b * HQ, HQ, D, UNIT, BLOCK_E)
    elif chunk < QS + KS:
        o_k = o_out + size * (HQ * D) + p * (HK * D)
        at = batch * HQ + b * HK
        _receive(x, o_x, xh, xd, out, o_k, chunk - QS, row, length, at, HK, D, UNIT, BLOCK_E)
    else:
        o_v = o_out + size * ((HQ + HK) * D) + p * (HV * D)
        at = batch * (HQ + HK) + b * HV
        _receive(x, o_x, xh, xd, out, o_v, chunk - QS - KS, row, length, at, HV, D, UNIT, BLOCK_E)
