"""Triton: two attentions merged (see :mod:`fxsp.kernels.attention.merge` for the meaning).

Imported only where a kernel is wanted: a CPU build of torch has no Triton.

Sizes: B batch, H heads, M tokens, E head dimension.  Prefixes: ``o_`` offset, ``m_`` mask, ``s_`` stride.  A program
has a tile of tokens x one head; programs that run at the same time have the heads of the same tokens, which are
neighbours in memory.  Arithmetic is in ``ACC`` (fp32, or fp64).  M changes from call to call and is not specialised on.

Strides of rows come in units of ``UNIT`` elements: from a stride of 72 the compiler learns nothing, from 9 times a unit
of 8 it learns that each row begins at a place from which 16 bytes can be moved at a time.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fxsp.kernels.attention.own_kernel import wide
from fxsp.types import as_length, same_length

__all__ = ["merge", "merge_kernel"]


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


@triton_op("fxsp_kernels::merge", mutates_args={})
def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`fxsp.kernels.attention.merge.merge`."""
    batch, heads, tokens, width = out.shape
    merged = torch.empty([batch, tokens, heads, width], dtype=dtype, device=out.device)
    total = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    # A tile is some 2048 elements, and all of a row: powers of two.
    block_e = max(16, 1 << (width - 1).bit_length())
    block_m = max(1, 2048 // block_e)
    # The largest number of elements at whose multiples all rows certainly begin; adds no guard.
    rows = [as_length(s) for x in (out, other) for s in x.stride()[:3]]
    unit = next(n for n in (8, 4, 2, 1) if all(same_length(as_length(s % n), 0) for s in rows))
    strides = []
    for x, a in ((out, lse), (other, other_lse)):
        strides += [*(s // unit for s in x.stride()[:3]), x.stride(3), *a.stride()]
    wrap_triton(merge_kernel)[(-(-tokens // block_m) * heads, batch, 1)](
        out, lse, other, other_lse, merged, total, heads, tokens, *strides, E=width, UNIT=unit, BLOCK_M=block_m,
        BLOCK_E=block_e, ACC=tl.float64 if wide(out.dtype) == torch.float64 else tl.float32,
    )  # fmt: skip
    return merged.transpose(1, 2), total
