"""What ``fxsp.merged_attention`` means, on lists with one tensor per rank: attention by its definition.

Every rank has the queries' attention to the keys of all ranks, in global order without pads.  Autograd differentiates
a rank's result by what that rank alone attends to, its own keys: that is the gradient of its keys and values, and its
summand of the gradients of queries and mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.simulation.reference.lanes import Flags, Lengths, pieces
from fxsp.simulation.reference.ring import by_autograd, weighted

__all__ = ["merged_attention", "merged_attention_backward"]


def merged_attention(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], mask: Sequence[Tensor] | None,
    k_lengths: Lengths, k_whole: Flags, causal: bool, scale: float | None, rank: int = 0, size: int = 1,
    group: str = "", k_head_tail: Flags = (), k_units: Lengths = (), exact: bool = False,
) -> Any:  # fmt: skip
    """``(out, lse, rest)`` of each rank; differentiable."""
    total = sum(k_lengths)
    # Who attends to which key, and in which of its rows it is.
    owner, row = [0] * total, [0] * total
    for piece in pieces(k_lengths, k_whole, size, k_head_tail, k_units):
        for r in [size - 1] if piece.whole else range(size):
            for i, token in enumerate(piece.rows(r).tolist()):
                if token < piece.length:
                    owner[piece.start + token], row[piece.start + token] = r, piece.local_start + i
    dtype = torch.float64 if q[0].dtype == torch.float64 else torch.float32
    scale = q[0].shape[-1] ** -0.5 if scale is None else scale
    groups = q[0].shape[1] // k[0].shape[1]
    results = []
    for r in range(size):
        mine = torch.tensor([o == r for o in owner], device=q[r].device)

        def own(x: Sequence[Tensor], r: int = r) -> Tensor:
            rows = [(x[o] if o == r else x[o].detach())[:, :, i] for o, i in zip(owner, row, strict=True)]
            return torch.stack(rows, 2).to(dtype).repeat_interleave(groups, 1)

        keys, values = own(k), own(v)
        near, far = (torch.einsum("bhmd,bhnd->bhmn", x.to(dtype), keys) for x in (q[r], q[r].detach()))
        scores: Tensor = torch.where(mine, near, far) * scale
        if mask is not None:
            given = mask[r]
            if given.dtype == torch.bool:
                scores = scores.masked_fill(~given, -torch.inf)
            else:
                scores = scores + torch.where(mine, given, given.detach())
        if causal:
            past = torch.arange(total) <= torch.arange(scores.shape[2]).unsqueeze(1)
            scores = scores.masked_fill(~past, -torch.inf)
        by_softmax = exact or q[r].shape[-1] != v[r].shape[-1] or (mask is not None and mask[r].requires_grad)
        out, lse, rest = weighted(scores, values, by_softmax)
        results.append((out.to(q[r].dtype), lse, rest))
    return results


def merged_attention_backward(
    grad: Sequence[Tensor], q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor],
    mask: Sequence[Tensor] | None, out: Sequence[Tensor], lse: Sequence[Tensor],
    rest: Sequence[Tensor], k_lengths: Lengths, k_whole: Flags, causal: bool, scale: float | None,
    mask_grad: bool, rank: int = 0, size: int = 1, group: str = "", k_head_tail: Flags = (),
    k_units: Lengths = (), exact: bool = False,
) -> Any:  # fmt: skip
    """The gradients of q, k, v and the mask, by autograd of :func:`merged_attention`."""

    def run(queries: Any, keys: Any, values: Any, masks: Any) -> Any:
        return merged_attention(
            queries, keys, values, masks, k_lengths, k_whole, causal, scale, 0, size, "", k_head_tail, k_units, exact
        )

    return by_autograd(run, grad, q, k, v, mask, mask_grad)


OPERATORS = (merged_attention, merged_attention_backward)
