"""Triton: two attentions merged, and its backward pass (see :mod:`fxsp.kernels.attention.merge` for the meaning).

Imported only where a kernel is wanted: a CPU build of torch has no Triton.

Sizes: B batch, H heads, M tokens, E head dimension.  Prefixes: ``o_`` offset, ``m_`` mask, ``s_`` stride.  A program
has a tile of tokens x one head; programs that run at the same time have the heads of the same tokens, which are
neighbours in memory.  Arithmetic is in ``ACC`` (fp32, or fp64).  M changes from call to call and is not specialised on.

Strides of rows come in units of ``UNIT`` elements: from a stride of 72 the compiler learns nothing, from 9 times a unit
of 8 it learns that each row begins at a place from which 16 bytes can be moved at a time.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_backward_kernel", "merge_kernel"]


@triton.jit
def _tile(H, M, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, E: tl.constexpr):
    """Head, batch entry, tokens and elements of this program, and the masks of the latter two."""
    h = (tl.program_id(0) % H).to(tl.int64)
    m = (tl.program_id(0) // H).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_E)
    return h, tl.program_id(1).to(tl.int64), m, e, m < M, e < E


@triton.jit
def _weights(a, b):
    """The shares of two log-sum-exps in their sum, and the log of that; zero and ``-inf`` if both are ``-inf``."""
    top = tl.maximum(a, b)
    # Of two -inf the difference would be NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp(a - base)
    q = tl.exp(b - base)
    total = p + q
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    return p * scale, q * scale, base + tl.log(total)


@triton.jit
def _rows(x, s_b, s_h, s_m, s_e, n, h, m, e, m_x, UNIT: tl.constexpr, ACC: tl.constexpr):
    """The tile of ``x``, zero where the mask is not set."""
    o_row = (n * s_b + h * s_h + m * s_m) * UNIT
    return tl.load(x + o_row[:, None] + (e * s_e)[None, :], mask=m_x, other=0.0).to(ACC)


@triton.jit
def _sums(a, s_b, s_h, s_m, n, h, m, m_m, ACC: tl.constexpr):
    """One number for each token of the tile."""
    return tl.load(a + n * s_b + h * s_h + m * s_m, mask=m_m, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["H", "M", "s_ab", "s_ah", "s_am", "s_bb", "s_bh", "s_bm"])
def merge_kernel(
    x, a, y, b, out, lse, H, M,
    s_xb, s_xh, s_xm, s_xe, s_ab, s_ah, s_am, s_yb, s_yh, s_ym, s_ye, s_bb, s_bh, s_bm,
    E: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``x, y [B, H, M, E]`` with ``a, b [B, H, M]`` -> ``out [B, M, H, E]`` and ``lse [B, H, M]``, both contiguous.

    Grid: (tiles of tokens * H, B).
    """
    h, n, m, e, m_m, m_e = _tile(H, M, BLOCK_M, BLOCK_E, E)
    left = _sums(a, s_ab, s_ah, s_am, n, h, m, m_m, ACC)
    right = _sums(b, s_bb, s_bh, s_bm, n, h, m, m_m, ACC)
    p, q, total = _weights(left, right)
    # A row that saw no key is not read: whatever stands there counts for nothing.
    m_tile = m_m[:, None] & m_e[None, :]
    m_x = m_tile & (left != float("-inf"))[:, None]
    m_y = m_tile & (right != float("-inf"))[:, None]
    vx = _rows(x, s_xb, s_xh, s_xm, s_xe, n, h, m, e, m_x, UNIT, ACC)
    vy = _rows(y, s_yb, s_yh, s_ym, s_ye, n, h, m, e, m_y, UNIT, ACC)
    merged = p[:, None] * vx + q[:, None] * vy
    o_out = (n * M + m) * (H * E) + h * E
    tl.store(out + o_out[:, None] + e[None, :], merged.to(out.dtype.element_ty), mask=m_tile)
    tl.store(lse + (n * H + h) * M + m, total, mask=m_m)


@triton.jit(do_not_specialize=["H", "M", "s_ab", "s_ah", "s_am", "s_bb", "s_bh", "s_bm", "s_lb", "s_lh", "s_lm"])
def merge_backward_kernel(
    g, gl, x, a, y, b, dx, da, dy, db, H, M,
    s_gb, s_gh, s_gm, s_ge, s_lb, s_lh, s_lm,
    s_xb, s_xh, s_xm, s_xe, s_ab, s_ah, s_am, s_yb, s_yh, s_ym, s_ye, s_bb, s_bh, s_bm,
    E: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients ``g [B, H, M, E]`` of ``out`` and ``gl [B, H, M]`` of ``lse`` -> those of x, a, y, b.

    ``dx, dy`` are ``[B, M, H, E]``, ``da, db`` are ``[B, H, M]``, contiguous.  With shares p, q and out = p x + q y::

        dx = p g      da = p (gl + <g, x - out>)      dy = q g      db = q (gl + <g, y - out>)

    Grid: (tiles of tokens * H, B).
    """
    h, n, m, e, m_m, m_e = _tile(H, M, BLOCK_M, BLOCK_E, E)
    left = _sums(a, s_ab, s_ah, s_am, n, h, m, m_m, ACC)
    right = _sums(b, s_bb, s_bh, s_bm, n, h, m, m_m, ACC)
    of_lse = _sums(gl, s_lb, s_lh, s_lm, n, h, m, m_m, ACC)
    p, q, _ = _weights(left, right)
    m_tile = m_m[:, None] & m_e[None, :]
    m_x = m_tile & (left != float("-inf"))[:, None]
    m_y = m_tile & (right != float("-inf"))[:, None]
    vg = _rows(g, s_gb, s_gh, s_gm, s_ge, n, h, m, e, m_tile, UNIT, ACC)
    vx = _rows(x, s_xb, s_xh, s_xm, s_xe, n, h, m, e, m_x, UNIT, ACC)
    vy = _rows(y, s_yb, s_yh, s_ym, s_ye, n, h, m, e, m_y, UNIT, ACC)
    # x - out is q (x - y), y - out is p (y - x): no difference of nearly equal sums.
    both = tl.sum(vg * (vx - vy), axis=1)
    o_x = ((n * M + m) * (H * E) + h * E)[:, None] + e[None, :]
    o_a = (n * H + h) * M + m
    tl.store(dx + o_x, (p[:, None] * vg).to(dx.dtype.element_ty), mask=m_tile)
    tl.store(dy + o_x, (q[:, None] * vg).to(dy.dtype.element_ty), mask=m_tile)
    tl.store(da + o_a, (p * (of_lse + q * both)).to(da.dtype.element_ty), mask=m_m)
    tl.store(db + o_a, (q * (of_lse - p * both)).to(db.dtype.element_ty), mask=m_m)
