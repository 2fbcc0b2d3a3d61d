"""Attention of few whole queries to keys that are split: each rank attends to its own keys, and the results are merged.

A resampler, a decoder with learned queries, an adapter: the queries are whole on every rank, and few; the keys are the
long sequence.  What travels are outputs and log-sum-exps of the queries, in one all-gather::

    lse = log(sum over ranks of exp(lse_r))          out = sum over ranks of exp(lse_r - lse) out_r

(the merge of the online softmax, of all blocks at once, as FlashDecoding does with split keys, Dao et al. 2023).  A
log-sum-exp travels as two numbers, level and rest (:mod:`fxsp.kernels.attention.merge`).
In the backward pass nothing travels here: with the final output and log-sum-exp each rank computes the gradients of its
own keys and values, and its summand of the gradient of the queries.

Keys of a segment that is whole on every rank are seen by the last rank only, which has the fewest others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.attention.merge import above, rounded, wide
from fxsp.kernels.attention.ring_bias import bias_of, four, keys_of, mask_gradient, tokens_first
from fxsp.kernels.attention.ring_blocks import Chunk, Meeting, chunks_of
from fxsp.kernels.attention.ring_kernels import block_backward, block_forward
from fxsp.kernels.rows import cut, joined
from fxsp.types import as_length, same_length

__all__ = ["merged_attention", "merged_attention_backward", "packed_width"]

_INFINITY = float("inf")


def packed_width(width: Any, dtype: torch.dtype) -> Any:
    """Elements of ``dtype`` that travel for a query: its output of ``width``, and its log-sum-exp: two wide numbers."""
    return width + 2 * wide(dtype).itemsize // dtype.itemsize


class _Block:
    """A rank's own keys, which meet all queries in one call."""

    def __init__(
        self, q: Tensor, mask: Tensor | None, lengths: Any, whole: Any, causal: bool, rank: int, size: int,
        head_tail: Any, units: Any,
    ) -> None:  # fmt: skip
        self.chunks = chunks_of(lengths, whole, 1, size, rank, head_tail, units)
        kept = tuple(
            j
            for j, c in enumerate(self.chunks)
            if not (c.whole and rank != size - 1) and not (isinstance(c.real, int) and c.real == 0)
        )
        m = q.shape[2]
        self.queries = [Chunk(0, 0, 0, m, 0, m, True)]
        pads = any(self.chunks[j].pads for j in kept)
        self.call = Meeting((0,), kept, "positions" if causal else "full", pads)
        self.mask = four(mask)
        self.bias = bias_of(self.mask, self.queries, self.chunks, self.call, causal, None, q) if kept else None

    @property
    def empty(self) -> bool:
        return not self.call.keys

    def rows(self, x: Tensor) -> Tensor:
        """Those rows of ``[B, h, L, D]`` that are attended to."""
        return keys_of(x, self.chunks, self.call.keys)

    def spread(self, g: Tensor, like: Tensor) -> Tensor:
        """The way back: zeros for pads, and for what another rank attends to."""
        pieces = []
        seen = iter(cut(g, [self.chunks[j].real for j in self.call.keys], 2))
        for j, c in enumerate(self.chunks):
            used = c.real if j in self.call.keys else 0
            if j in self.call.keys:
                pieces.append(next(seen))
            if not same_length(as_length(c.rows), as_length(used)):
                pieces.append(like.new_zeros([*like.shape[:2], c.rows - used, like.shape[3]], dtype=g.dtype))
        return joined(pieces, 2).to(like.dtype)


def _own(q: Tensor, k: Tensor, v: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, level and rest of the queries over this rank's keys; zero, ``-inf``, zero where there is none."""
    if block.empty:
        level = q.new_full(q.shape[:3], -_INFINITY, dtype=wide(q.dtype))
        return q.new_zeros([*q.shape[:3], v.shape[3]]), level, torch.zeros_like(level)
    out, level, rest = block_forward(q, block.rows(k), block.rows(v), block.bias, False, scale)
    return out.to(q.dtype), level, rest


def merged_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_lengths: Any, k_whole: Any, causal: bool,
    scale: float | None, rank: int, size: int, group: str, k_head_tail: Any = (), k_units: Any = (),
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(out [B, H, m, E], lse [B, H, m], rest [B, H, m])`` of whole queries over everyone's keys, equal on all ranks.

    The log-sum-exp is rounded to one number, ``lse``; with the ``rest`` it is exact.

    ``q [B, H, m, D]`` and ``mask`` (all rows, all keys in global order) are whole; ``k [B, h, Lk, D]`` and
    ``v [B, h, Lk, E]`` are local rows.  ``causal`` is ``key position <= query position``.
    ``exact``: torch would write this attention out (:mod:`fxsp.kernels.attention.own_kernel`); it says something for
    gradients.
    """
    block = _Block(q, mask, k_lengths, k_whole, causal, rank, size, k_head_tail, k_units)
    out, level, rest = _own(q, k, v, block, q.shape[3] ** -0.5 if scale is None else scale)
    if size == 1:
        lse, rest = rounded(level, rest)
        return tokens_first(out), lse.contiguous(), rest.contiguous()
    width = v.shape[3]
    message = torch.cat([out, torch.stack([level, rest], -1).view(q.dtype)], -1)
    every = collectives.all_gather(message, size, group).view([size, *message.shape])
    outs = every.narrow(4, 0, width).to(level.dtype)
    levels, rests = every.narrow(4, width, message.shape[3] - width).contiguous().view(level.dtype).unbind(-1)
    level = levels.amax(0)
    sums = above(levels, rests, level)
    total = sums.logsumexp(0)
    # Of two -inf the difference would be NaN.
    shares = (sums - torch.where(total == -_INFINITY, 0.0, total)).exp().unsqueeze(-1)
    merged = (outs.masked_fill(shares == 0, 0) * shares).sum(0)
    return tokens_first(merged.to(q.dtype)), *rounded(level, total)


def merged_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor,
    k_lengths: Any, k_whole: Any, causal: bool, scale: float | None, mask_grad: bool, rank: int, size: int, group: str,
    k_head_tail: Any = (), k_units: Any = (), exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q and the mask (summands), k and v, from what :func:`merged_attention` gave.

    That of the mask has no elements unless ``mask_grad``.
    """
    block = _Block(q, mask, k_lengths, k_whole, causal, rank, size, k_head_tail, k_units)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    none = q.new_zeros([0]) if mask is None or not mask_grad else torch.zeros_like(mask)
    if block.empty:
        dq, dk, dv = (tokens_first(torch.zeros_like(x)) for x in (q, k, v))
        return dq, dk, dv, none
    dq, dk, dv, dbias = block_backward(
        grad, q, block.rows(k), block.rows(v), block.bias, out, lse, rest, False, scale, mask_grad, None, exact
    )
    results = [tokens_first(x) for x in (dq.to(q.dtype), block.spread(dk, k), block.spread(dv, v))]
    if dbias is not None and block.mask is not None and mask is not None:
        start = torch.zeros_like(block.mask, dtype=dbias.dtype)
        dbias = mask_gradient(start, dbias, block.queries, block.chunks, block.call)
        none = dbias.to(mask.dtype).view(mask.shape)
    return results[0], results[1], results[2], none
