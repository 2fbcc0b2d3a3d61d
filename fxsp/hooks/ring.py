"""Ring attention, and Ulysses within a ring, on split tokens in eager mode: ``fxsp.passes.attention.methods.ring`` on
tensors.

``u * r`` ranks: ``u`` consecutive ranks exchange heads for tokens, so that together they are one place of a ring of
``r``; keys and values go from rank ``i`` to ``i + u``; then the output is exchanged back.  ``u = 1`` is a plain ring.
"""

from __future__ import annotations

from torch import Tensor

from fxsp.hooks.dispatch import gather, mark, shard
from fxsp.hooks.exchange import to_heads, to_tokens
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, layout_of, moved
from fxsp.kernels.attention.own_kernel import written_out
from fxsp.kernels.ops import fxsp_ops as _ops

__all__ = ["ring", "ring_refusal"]


def ring_refusal(q: Tensor, k: Tensor, v: Tensor, ulysses: int, gqa: bool) -> str:
    """Why keys and values cannot go around the ring, or nothing."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "no dimension of heads"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return "queries and keys differ in batch size"
    heads, shared = q.shape[1], k.shape[1]
    if shared != v.shape[1] or heads % shared or (heads != shared and not gqa):
        return f"{shared} key/value heads do not serve {heads} query heads one by one"
    return "" if heads % ulysses == shared % ulysses == 0 else f"heads do not divide over {ulysses} ranks"


def ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool, lq: Layout,
    lk: Layout,
) -> Tensor:  # fmt: skip
    """``q [B, H, L, D]``, ``k [B, h, L, D]``, ``v [B, h, L, E]``, split -> ``[B, H, L, E]``, split like the queries.

    ``mask`` is whole, or split by rows like the queries; it has a column for every key.
    """
    region = lq.region
    exact = written_out(q, k, v, mask, gqa)
    if region.ulysses > 1:
        q, k, v = to_heads(q, k, v, lq, lk, region.ulysses)
        mask = None if mask is None else _mask_of_place(mask, lq)
    elif mask is not None:
        mask = _mask_of_rank(mask, lq)
    out, *_ = _ops.ring_attention.default(
        q, k, v, mask, list(lq.lengths), list(lq.whole), list(lk.lengths), list(lk.whole),
        causal, scale, region.ulysses, region.rank, region.size, region.group, exact=exact,
    )  # fmt: skip
    if region.ulysses > 1:
        out = to_tokens(out, lq, region.ulysses)
    return mark(out, moved(lq, 2))


def _has_rows(mask: Tensor, layout: Layout) -> bool:
    return mask.dim() >= 2 and (mask.shape[-2] != 1 or sum(layout.lengths) == 1)


def _mask_of_rank(mask: Tensor, lq: Layout) -> Tensor:
    """The rows of this rank's queries."""
    layout = layout_of(mask)
    if layout is not None:
        return mask
    return shard(mask, moved(lq, mask.dim() - 2)) if _has_rows(mask, lq) else use(mask, lq.region)


def _mask_of_place(mask: Tensor, lq: Layout) -> Tensor:
    """The rows of this place's queries, and the heads of this rank."""
    layout, region = layout_of(mask), lq.region
    rows = _has_rows(mask, lq) or (layout is not None and layout.dim == mask.dim() - 2)
    mask = gather(mask, layout, used=True) if layout is not None else use(mask, region)
    u = region.ulysses
    if mask.dim() >= 3 and mask.shape[-3] != 1:
        mask = _ops.take.default(mask, mask.dim() - 3, region.rank % u, u)
    if rows:
        places = (list(lq.lengths), list(lq.whole), u, region.rank, region.size, mask.device)
        mask = mask.index_select(mask.dim() - 2, _ops.place_positions.default(*places))
    return mask
