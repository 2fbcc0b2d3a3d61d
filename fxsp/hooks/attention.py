"""Attention over split tokens in eager mode: the methods of ``fxsp.passes.attention.decide``, on tensors.

========== ==================================== ======================================================================
method     when                                 what moves
========== ==================================== ======================================================================
local      queries split, keys/values whole     nothing
ulysses    both split, heads divide             one all-to-all of q, k, v; one of the output
ring       both split, it is asked for          keys and values, block by block
hybrid     both split, it is asked for          an exchange of heads among some ranks, a ring of the others
gather_kv  both split, otherwise                one all-gather of keys and values
whole      queries whole, keys/values split     one all-gather of keys and values; the result is whole
========== ==================================== ======================================================================

The degrees of the configuration choose; what is not legal for a method falls to the next one, and the report says so.
Without a ring keys and values are whole, without pads and in their original order, so masks and the causal flag keep
their meaning; a ring cuts its blocks out of them by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp.hooks.dispatch import Call, gather, mark, shard
from fxsp.hooks.exchange import to_heads, to_tokens
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, global_size, layout_of, moved, same_tokens
from fxsp.hooks.region import Region
from fxsp.hooks.rules import aligned
from fxsp.hooks.values import made_whole
from fxsp.hooks.where import caller, refuse
from fxsp.kernels.attention.own_kernel import written_out
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.report import AttentionRecord

__all__ = ["attention"]


class _Attention(NamedTuple):
    """One call of SDPA: ``q [.., H, m, d]``, ``k [.., h, n, d]``, ``v [.., h, n, e]``."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None
    gqa: bool

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=self.gqa
        )


def attention(call: Call) -> Tensor:
    """SDPA where any argument is split; the result is split as the queries are."""
    name, options = call.name, call.kwargs
    q, k, v = (call.get(i, key) for i, key in enumerate(("query", "key", "value")))
    if call.get(4, "dropout_p", 0.0):
        refuse(name, "with dropout on split tokens cannot draw the mask of one device; set it to 0")
    mask, causal = call.get(3, "attn_mask"), bool(call.get(5, "is_causal", False))
    x = _Attention(name, q, k, v, mask, causal, options.get("scale"), bool(options.get("enable_gqa", False)))
    if mask is not None and causal:
        refuse(name, "takes a mask or is_causal, not both")
    layouts = [layout_of(t) for t in (q, k, v)]
    if all(layout is None or layout.dim < t.dim() - 2 for layout, t in zip(layouts, (q, k, v), strict=True)):
        return _stacked(x)
    for layout, t in zip(layouts, (q, k, v), strict=True):
        if layout is not None and (layout.dim != t.dim() - 2 or layout.outer != 1 or layout.inner != 1):
            refuse(name, f"has tokens split along dimension {layout.dim} of {t.dim()}, beside others")
    return _by_tokens(x, *layouts)


def _stacked(x: _Attention) -> Tensor:
    """Tokens along a dimension that attention treats one by one (the batch: attention within each frame, say)."""
    operands = [x.q, x.k, x.v] + ([x.mask] if x.mask is not None else [])
    layout = next(layout for layout in map(layout_of, operands) if layout is not None)
    if x.gqa and layout.dim == max(t.dim() for t in operands) - 3:
        refuse(x.name, "with shared heads has tokens split along the heads")
    new, layout, back = aligned(x.name, operands)
    out = x.run(new[0], new[1], new[2], new[3] if x.mask is not None else None, x.causal)
    _record(layout.region, "local", detail="tokens in the batch")
    return mark(out, moved(layout, out.dim() + back))


def _by_tokens(x: _Attention, lq: Layout | None, lk: Layout | None, lv: Layout | None) -> Tensor:
    if lq is None:
        region = next(layout.region for layout in (lk, lv) if layout is not None)
        _record(region, "whole", detail="queries are whole")
        k, v, mask = map(made_whole, (x.k, x.v, x.mask))
        return x.run(x.q, k, v, mask, x.causal)
    region = lq.region
    if lk is None or lv is None:  # one of them alone is whole, or both are
        k, v = (use(made_whole(t), region) for t in (x.k, x.v))
        _record(region, "local", detail="keys and values are whole")
        return _rows(x, k, v, lq)
    if not same_tokens(lk, lv):
        refuse(x.name, "has keys and values of different tokens")
    ways = [("hybrid" if region.ulysses > 1 else "ring", region.ulysses)] if region.ring > 1 else []
    why: list[tuple[str, str]] = []
    for method, u in [*ways, ("ulysses", region.size)]:
        refusal = _refusal(x, region, u, ring=method != "ulysses")
        if not refusal:
            _record(region, method, why)
            return _exchanged(x, lq, lk, u, ring=method != "ulysses")
        why.append((method, refusal))
    _record(region, "gather_kv", why)
    width = x.k.shape[-1]
    both = gather(torch.cat([x.k, x.v], -1), lk, used=True)
    return _rows(x, both[..., :width], both[..., width:], lq)


def _refusal(x: _Attention, region: Region, u: int, *, ring: bool) -> str:
    """Why ``u`` ranks cannot exchange tokens for heads, or keys and values not go around the ring; or nothing."""
    if region.allgather > 1:
        return "allgather_degree asks for gathered keys and values"
    if not x.q.dim() == x.k.dim() == x.v.dim() == 4:
        return "no dimension of heads"
    if not x.q.shape[0] == x.k.shape[0] == x.v.shape[0]:
        return "queries and keys differ in batch size"
    heads, shared = x.q.shape[1], x.k.shape[1]
    if ring:
        if shared != x.v.shape[1] or heads % shared or (heads != shared and not x.gqa):
            return f"{shared} key/value heads do not serve {heads} query heads one by one"
        return "" if heads % u == shared % u == 0 else f"heads do not divide over {u} ranks"
    numbers = (("query", heads), ("key", shared), ("value", x.v.shape[1]))
    return next((f"{n} {what} heads do not divide over {u} ranks" for what, n in numbers if n % u), "")


def _record(region: Region, method: str, why: Sequence[tuple[str, str]] = (), detail: str = "") -> None:
    if not torch.compiler.is_compiling():
        module, source = caller()
        region.report.attentions.append(AttentionRecord(module, source, method, None, tuple(why), detail))


def _rows(x: _Attention, k: Tensor, v: Tensor, lq: Layout) -> Tensor:
    """This rank's queries against all keys."""
    mask = _mask(x, lq, k.shape[-2], 1)
    if x.causal:
        places = (list(lq.lengths), list(lq.whole), lq.region.rank, lq.region.size, x.q.device)
        rows: Tensor = _ops.positions.default(*places)
        mask = rows[:, None] >= torch.arange(k.shape[-2], device=x.q.device)
    out = x.run(x.q, k, v, mask, False)
    return mark(out, moved(lq, out.dim() - 2))


def _exchanged(x: _Attention, lq: Layout, lk: Layout, u: int, *, ring: bool) -> Tensor:
    """``u`` consecutive ranks exchange tokens for heads, attend, and exchange back.

    In a ring they are one place together (``u`` may be 1), and keys and values go from rank ``i`` to ``i + u``.
    """
    region, q, k, v = lq.region, x.q, x.k, x.v
    exact = ring and written_out(q, k, v, x.mask, x.gqa)
    if u > 1:
        q, k, v = to_heads(q, k, v, lq, lk, u)
    mask = _mask(x, lq, sum(lk.lengths), u)
    if ring:
        out, *_ = _ops.ring_attention.default(
            q, k, v, mask, list(lq.lengths), list(lq.whole), list(lk.lengths), list(lk.whole),
            x.causal, x.scale, u, region.rank, region.size, region.group, exact=exact,
        )  # fmt: skip
    else:
        out = x.run(q, k, v, mask, x.causal)
    return mark(to_tokens(out, lq, u) if u > 1 else out, moved(lq, 2))


def _mask(x: _Attention, lq: Layout, keys: int, u: int) -> Tensor | None:
    """The mask for all keys, and the queries and heads that this rank has where ``u`` ranks exchange tokens for heads:
    its own rows of all heads, those of its place in the ring, or all."""
    mask, region = x.mask, lq.region
    if mask is None:
        return None
    layout, shape = layout_of(mask), list(mask.shape)
    if layout is not None:
        shape[layout.dim] = global_size(layout)
    if shape[-1] not in (1, keys):
        refuse(
            x.name,
            f"has a mask for {shape[-1]} keys, and there are {keys} in all.  A mask made from a local length is "
            "of no use: make it of the global one, or name it in the plan",
        )
    if u == 1 and layout is not None and layout.dim == mask.dim() - 2 and same_tokens(layout, lq):
        return mask
    rows = shape[-2] if len(shape) >= 2 else 1
    if rows not in (1, sum(lq.lengths)):
        refuse(x.name, f"has a mask for {rows} queries, and there are {sum(lq.lengths)} in all")
    # Rows are cut by `shard`, which gathers their gradient; of a row for all queries each rank has a summand.
    if u == 1 and rows != 1:
        return shard(made_whole(mask), moved(lq, len(shape) - 2))
    own: Tensor = use(mask, region) if layout is None else gather(mask, layout, used=True)
    if u > 1 and len(shape) >= 3 and shape[-3] != 1:
        own = _ops.take.default(own, len(shape) - 3, region.rank % u, u)
    if 1 < u < region.size and rows != 1:
        places = (list(lq.lengths), list(lq.whole), u, region.rank, region.size, own.device)
        own = own.index_select(len(shape) - 2, _ops.place_positions.default(*places))
    return own
