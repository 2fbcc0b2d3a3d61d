"""What one call of the block kernel in a ring sees: its rows and columns of the mask, what is forbidden, and dropout.

A call is a :class:`~fxsp.kernels.attention.ring_blocks.Meeting` of some of the queries and some of the keys that are
here; what positions (the causal flag, a window) and pads forbid becomes an additive bias, but for what the kernel's
own causal flag says.  Most calls of a causal ring see all of their keys, and have no bias at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.banded import allowed as allowed_by_band
from fxsp.kernels.attention.own_kernel import wide
from fxsp.kernels.attention.ring_blocks import Chunk, Meeting
from fxsp.kernels.draws import kept
from fxsp.kernels.rows import joined
from fxsp.types import as_length, same_length

__all__ = [
    "Draw",
    "bias_of",
    "four",
    "keys_of",
    "mask_gradient",
    "one",
    "positions",
    "range_of",
    "tokens_first",
    "tokens_of",
]

Size = Any


def range_of(chunks: Sequence[Chunk], which: Sequence[int]) -> tuple[Size, Size]:
    """First row and number of rows of adjacent chunks."""
    rows = chunks[which[0]].rows
    for i in which[1:]:
        rows = rows + chunks[i].rows
    return chunks[which[0]].row, rows


def keys_of(x: Tensor, chunks: Sequence[Chunk], which: Sequence[int]) -> Tensor:
    """The first ``real`` rows of these chunks."""
    if len(which) == len(chunks) and all(same_length(as_length(k.real), as_length(k.rows)) for k in chunks):
        return x
    return joined([x.narrow(2, chunks[j].row, chunks[j].real) for j in which], 2)


def one(n: Size) -> bool:
    """Whether a size certainly is 1; adds no guard."""
    return same_length(as_length(n), 1)


def bias_of(
    mask: Tensor | None, queries: Sequence[Chunk], keys: Sequence[Chunk], meeting: Meeting, causal: bool,
    window: Size, like: Tensor,
) -> Tensor | None:  # fmt: skip
    """The additive bias of one call: this call's rows and columns of the mask, and what positions and pads forbid."""
    bias = None
    if mask is not None:
        rows, columns = mask.shape[-2:]
        part = mask
        if not one(rows):
            part = part.narrow(-2, *range_of(queries, meeting.queries))
        if not one(columns):
            part = _columns(part, keys, meeting.keys)
        if part.dtype == torch.bool:
            bias = torch.zeros([], dtype=like.dtype, device=like.device).where(part, float("-inf"))
        else:
            # Beside half precision a mask may be fp32, and its smallest number more than half precision holds.
            bias = part.to(torch.promote_types(part.dtype, like.dtype))
    allowed = _allowed(queries, keys, meeting, causal, window, like.device)
    if mask is not None and meeting.how == "causal":
        # Fused kernels take the causal flag or a bias, not both: with both, gradients of the CPU's are wrong.
        rows = sum(queries[i].rows for i in meeting.queries)
        columns = sum(keys[j].real for j in meeting.keys)
        past = torch.arange(columns, device=like.device) <= torch.arange(rows, device=like.device).unsqueeze(1)
        allowed = past if allowed is None else past & allowed
    if allowed is not None:
        zero = torch.zeros([], dtype=like.dtype, device=like.device)
        bias = (zero if bias is None else bias).where(allowed, float("-inf"))
        bias = bias.view([1] * (4 - bias.dim()) + list(bias.shape))
    return bias


def mask_gradient(total: Tensor, g: Tensor, queries: Sequence[Chunk], keys: Sequence[Chunk], call: Meeting) -> Tensor:
    """``total`` with the gradient of one call's scores added where its rows and columns are."""
    for dim in (0, 1, 2, 3):
        if one(total.shape[dim]):
            g = g.sum(dim, keepdim=True)
    if not one(total.shape[2]):
        first, rows = range_of(queries, call.queries)
        g = torch.constant_pad_nd(g, [0, 0, first, total.shape[2] - first - rows])
    if one(total.shape[3]):
        return total + g
    columns = [positions(keys[j], g.device, keys[j].real).clamp(max=keys[j].limit - 1) for j in call.keys]
    # Columns of pads have no gradient: adding it to that of the last token changes nothing.
    return total.index_add(3, torch.cat(columns), g)


def four(mask: Tensor | None) -> Tensor | None:
    """A mask with all four dimensions."""
    return None if mask is None else mask.view([1] * (4 - mask.dim()) + list(mask.shape))


def tokens_first(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` that lies as ``[B, L, H, D]`` in memory, as fused kernels give it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _columns(mask: Tensor, keys: Sequence[Chunk], which: Sequence[int]) -> Tensor:
    """The columns of a mask (global, in order) that belong to these chunks."""
    pieces = []
    for j in which:
        k = keys[j]
        if k.pads:
            pieces.append(mask.index_select(-1, positions(k, mask.device).clamp(max=k.limit - 1)))
        else:
            pieces.append(mask.narrow(-1, k.first, k.real))
    return joined(pieces, -1)


def positions(chunk: Chunk, device: torch.device, rows: Size = None) -> Tensor:
    """The place in the whole sequence of each row; that of a pad is not below ``chunk.limit``."""
    return torch.add(torch.arange(chunk.rows if rows is None else rows, device=device), chunk.first)


def tokens_of(
    queries: Sequence[Chunk], keys: Sequence[Chunk], meeting: Meeting, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``([m], [n])``: the tokens of one call's queries and keys; a pad of the queries is its segment's last token."""
    rows = [positions(c, device).clamp(max=c.limit - 1) for c in (queries[i] for i in meeting.queries)]
    columns = [positions(keys[j], device, keys[j].real) for j in meeting.keys]
    return torch.cat(rows), torch.cat(columns)


def _allowed(
    queries: Sequence[Chunk], keys: Sequence[Chunk], meeting: Meeting, causal: bool, window: Size, device: torch.device
) -> Tensor | None:
    """``[m, n]`` or ``[1, n]``: what positions and pads allow."""
    real = None
    if meeting.pads:
        parts = [positions(keys[j], device, keys[j].real) < keys[j].limit for j in meeting.keys]
        real = torch.cat(parts).unsqueeze(0)
    if meeting.how != "positions":
        return real
    return allowed_by_band(*tokens_of(queries, keys, meeting, device), causal, window, real)


@dataclass(frozen=True)
class Draw:
    """Dropout of an attention that is computed block by block.

    Whether a probability stays is a hash of one seed and of its place in the whole attention: batch entry, head, query,
    key (:mod:`fxsp.kernels.draws`).  So it does not matter which rank computes a block, nor when; the backward pass
    draws the same once more, and nothing but the seed is kept for it.

    With weights ``w`` (0, or ``1 / (1 - p)``) and probabilities ``P`` the output is ``(P w) V``.  The log-sum-exp is
    that of all scores, dropped or not: blocks merge as they do without dropout.  So ``dP = w (g V^T)``, and as before
    the sum of ``P dP`` over all keys is ``g`` times the final output: ``dS = P (dP - g . out)``.
    """

    #: The probability of being dropped; int64 ``[1]``, the same on all ranks; the first of the heads here.
    p: float
    seed: Tensor
    head: int

    def weights(self, queries: Sequence[Chunk], keys: Sequence[Chunk], call: Meeting, q: Tensor) -> Tensor:
        """``[B, H, m, n]`` for one call of the block kernel; ``q [B, H, ...]``."""
        rows, columns = tokens_of(queries, keys, call, q.device)
        batch, heads = (torch.arange(n, device=q.device) for n in q.shape[:2])
        places = [batch.view(-1, 1, 1, 1), (heads + self.head).view(-1, 1, 1), rows.unsqueeze(1), columns]
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return kept(self.seed, places, self.p).to(wide(q.dtype)) * scale
