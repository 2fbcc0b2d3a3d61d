"""Attention of few whole queries to keys that are split: each rank attends to its own keys, and the results are merged.

A resampler, a decoder with learned queries, an adapter: the queries are whole on every rank, and few; the keys are the
long sequence.  What travels are outputs and log-sum-exps of the queries, in one all-gather::

    lse = log(sum over ranks of exp(lse_r))          out = sum over ranks of exp(lse_r - lse) out_r

(the merge of the online softmax, of all blocks at once, as FlashDecoding does with split keys, Dao et al. 2023).
In the backward pass nothing travels here: with the final output and log-sum-exp each rank computes the gradients of its
own keys and values, and its summand of the gradient of the queries.

Keys of a segment that is whole on every rank are seen by the last rank only, which has the fewest others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.merge import wide
from fxsp.kernels.ring_blocks import chunks_of
from fxsp.kernels.ring_kernels import block_backward, block_forward
from fxsp.types import as_length, same_length

__all__ = ["MERGED", "merged_attention", "merged_attention_backward", "packed_width"]

_INFINITY = float("inf")
#: A score plus such a bias is the bias: nothing is left of the score (of masks that hold the smallest number).
_ABSORBS = -1e30


def packed_width(width: Any, dtype: torch.dtype) -> Any:
    """Elements of ``dtype`` that travel for a query: its output of ``width``, and its log-sum-exp, which stays wide."""
    return width + wide(dtype).itemsize // dtype.itemsize


class _Block:
    """A rank's own keys, their columns in the mask, and what is added to the scores."""

    def __init__(
        self, q: Tensor, mask: Tensor | None, lengths: Any, whole: Any, causal: bool, rank: int, size: int,
        head_tail: Any,
    ) -> None:  # fmt: skip
        chunks = chunks_of(lengths, whole, 1, size, rank, head_tail)
        self.chunks = chunks
        self.kept = [
            c for c in chunks if not (c.whole and rank != size - 1) and not (isinstance(c.real, int) and c.real == 0)
        ]
        self.mask = None if mask is None else mask.view([1] * (4 - mask.dim()) + list(mask.shape))
        if not self.kept:
            return
        device = q.device
        at = [torch.arange(c.real, device=device) + c.first for c in self.kept]
        self.columns = torch.cat([x.clamp(max=c.limit - 1) for x, c in zip(at, self.kept, strict=True)])
        allowed = None
        if any(c.pads for c in self.kept):
            allowed = torch.cat([x < c.limit for x, c in zip(at, self.kept, strict=True)]).unsqueeze(0)
        if causal:
            past = self.columns <= torch.arange(q.shape[2], device=device).unsqueeze(1)
            allowed = past if allowed is None else past & allowed
        self.bias = self._bias(q, allowed)

    def _bias(self, q: Tensor, allowed: Tensor | None) -> Tensor | None:
        """``[b, h, m, n]``, with sizes of one where all are alike; None: nothing is added."""
        zero = torch.zeros([], dtype=q.dtype, device=q.device)
        bias = None
        if self.mask is not None:
            part = self.mask if _one(self.mask.shape[3]) else self.mask.index_select(3, self.columns)
            bias = zero.where(part, -_INFINITY) if part.dtype == torch.bool else part.to(q.dtype)
        if allowed is not None:
            bias = (zero if bias is None else bias).where(allowed, -_INFINITY)
            bias = bias.view([1] * (4 - bias.dim()) + list(bias.shape))
        return bias

    def rows(self, x: Tensor) -> Tensor:
        """Those rows of ``[B, h, L, D]`` that are attended to."""
        pieces = [x.narrow(2, c.row, c.real) for c in self.kept]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def spread(self, g: Tensor, like: Tensor) -> Tensor:
        """The way back: zeros for pads, and for what another rank attends to."""
        pieces, start = [], 0
        for c in self.chunks:
            used: Any = 0
            if any(c is k for k in self.kept):
                used = c.real
                pieces.append(g.narrow(2, start, used))
                start = start + used
            if not same_length(as_length(c.rows), as_length(used)):
                pieces.append(like.new_zeros([*like.shape[:2], c.rows - used, like.shape[3]], dtype=g.dtype))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).to(like.dtype)

    def absorbed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The largest bias of each row over the keys of all ranks, and whether all keys have one that swallows scores.

        One device then attends equally to the keys with the largest, and the log-sum-exp of a rank's keys cannot tell
        how many they were: it is replaced by the logarithm of their number.
        """
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        tops = self.mask.amax(3).to(dtype)
        return tops, (tops < _ABSORBS) & (tops > -_INFINITY)


def _one(n: Any) -> bool:
    return same_length(as_length(n), 1)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _own(q: Tensor, k: Tensor, v: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the queries over this rank's keys; zero and ``-inf`` where there is none."""
    if not block.kept:
        lse = q.new_full(q.shape[:3], -_INFINITY, dtype=wide(q.dtype))
        return q.new_zeros([*q.shape[:3], v.shape[3]]), lse
    out, lse = block_forward(q, block.rows(k), block.rows(v), block.bias, False, scale)
    absorbed = block.absorbed(q.dtype)
    if absorbed is not None and block.bias is not None:
        tops, rows = absorbed
        equal = block.bias == tops.unsqueeze(-1)
        count = equal.expand(*equal.shape[:3], block.columns.shape[0]).sum(-1)
        lse = torch.where(rows, count.to(lse.dtype).log(), lse)
    return out.to(q.dtype), lse.contiguous()


def merged_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_lengths: Any, k_whole: Any, causal: bool,
    scale: float | None, rank: int, size: int, group: str, k_head_tail: Any = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out [B, H, m, E], lse [B, H, m])`` of whole queries over everyone's keys, the same on every rank.

    ``q [B, H, m, D]`` and ``mask`` (all rows, all keys in global order) are whole; ``k [B, h, Lk, D]`` and
    ``v [B, h, Lk, E]`` are local rows.  ``causal`` is ``key position <= query position``.
    """
    block = _Block(q, mask, k_lengths, k_whole, causal, rank, size, k_head_tail)
    out, lse = _own(q, k, v, block, q.shape[3] ** -0.5 if scale is None else scale)
    if size == 1:
        return _tokens_first(out), lse
    width = v.shape[3]
    message = torch.cat([out, lse.unsqueeze(-1).view(q.dtype)], -1)
    every = collectives.all_gather(message, size, group).view([size, *message.shape])
    outs = every.narrow(4, 0, width).to(lse.dtype)
    sums = every.narrow(4, width, message.shape[3] - width).contiguous().view(lse.dtype).squeeze(-1)
    total = sums.logsumexp(0)
    # Of two -inf the difference would be NaN.
    shares = (sums - torch.where(total == -_INFINITY, 0.0, total)).exp().unsqueeze(-1)
    merged = (outs.masked_fill(shares == 0, 0) * shares).sum(0)
    return _tokens_first(merged.to(q.dtype)), total


def merged_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, k_lengths: Any,
    k_whole: Any, causal: bool, scale: float | None, mask_grad: bool, rank: int, size: int, group: str,
    k_head_tail: Any = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q and the mask (summands), k and v, from the final ``out`` and ``lse``.

    That of the mask has no elements unless ``mask_grad``.
    """
    block = _Block(q, mask, k_lengths, k_whole, causal, rank, size, k_head_tail)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    none = q.new_zeros([0]) if mask is None or not mask_grad else torch.zeros_like(mask)
    if not block.kept:
        dq, dk, dv = (_tokens_first(torch.zeros_like(x)) for x in (q, k, v))
        return dq, dk, dv, none
    absorbed = block.absorbed(q.dtype)
    if absorbed is not None:
        # The kernel's probabilities are 1 then, instead of one over the number of keys.
        level, which = (x.expand(*lse.shape) for x in absorbed)
        grad = torch.where(
            which.unsqueeze(-1), grad * torch.where(which, -lse, 0.0).exp().unsqueeze(-1).to(grad.dtype), grad
        )
        lse = torch.where(which, level.to(lse.dtype), lse)
    dq, dk, dv, dbias = block_backward(
        grad, q, block.rows(k), block.rows(v), block.bias, out, lse, False, scale, mask_grad
    )
    results = [_tokens_first(x) for x in (dq.to(q.dtype), block.spread(dk, k), block.spread(dv, v))]
    if dbias is not None and block.mask is not None and mask is not None:
        for dim in range(4):
            if _one(block.mask.shape[dim]):
                dbias = dbias.sum(dim, keepdim=True)
        if not _one(block.mask.shape[3]):
            # Columns of pads have no gradient: adding it to that of the last token changes nothing.
            dbias = torch.zeros_like(block.mask, dtype=dbias.dtype).index_add(3, block.columns, dbias)
        none = dbias.to(mask.dtype).view(mask.shape)
    return results[0], results[1], results[2], none


MERGED: dict[str, Callable[..., Any]] = {
    "merged_attention": merged_attention,
    "merged_attention_backward": merged_attention_backward,
}
