"""Attention over split tokens in eager mode: the methods of ``fxsp.passes.attention.decide``, on tensors.

========== ==================================== ======================================================================
method     when                                 what moves
========== ==================================== ======================================================================
local      queries split, keys/values whole     nothing
ulysses    both split, heads divide             one all-to-all of q, k, v; one of the output
ring       both split, it is asked for          keys and values, block by block (``fxsp.hooks.ring``)
hybrid     both split, it is asked for          an exchange of heads among some ranks, a ring of the others
gather_kv  both split, otherwise                one all-gather of keys and values
whole      queries whole, keys/values split     one all-gather of keys and values; the result is whole
========== ==================================== ======================================================================

The degrees of the configuration choose; what is not legal for a method falls to the next one, and the report says so.
Without a ring keys and values are whole, without pads and in their original order, so masks and the causal flag keep
their meaning; a ring cuts its blocks out of them by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp.hooks.dispatch import gather, mark, rule, shard
from fxsp.hooks.exchange import to_heads, to_tokens
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, layout_of, moved, same_tokens
from fxsp.hooks.region import Region
from fxsp.hooks.ring import ring, ring_refusal
from fxsp.hooks.rules import aligned, argument
from fxsp.hooks.where import caller, refuse
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.report import AttentionRecord

__all__ = ["attention"]


class _Call(NamedTuple):
    """One call of SDPA: ``q [.., H, m, d]``, ``k [.., h, n, d]``, ``v [.., h, n, e]``."""

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


@rule("scaled_dot_product_attention")
def attention(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """SDPA where any argument is split; the result is split as the queries are."""
    q, k, v = (argument(args, kwargs, i, key) for i, key in enumerate(("query", "key", "value")))
    if argument(args, kwargs, 4, "dropout_p", 0.0):
        refuse(name, "with dropout on split tokens cannot draw the mask of one device; set it to 0")
    mask = argument(args, kwargs, 3, "attn_mask")
    causal = bool(argument(args, kwargs, 5, "is_causal", False))
    call = _Call(q, k, v, mask, causal, kwargs.get("scale"), bool(kwargs.get("enable_gqa", False)))
    if mask is not None and call.causal:
        refuse(name, "takes a mask or is_causal, not both")
    layouts = [layout_of(x) for x in (q, k, v)]
    if all(layout is None or layout.dim < x.dim() - 2 for layout, x in zip(layouts, (q, k, v), strict=True)):
        return _stacked(name, call)
    for layout, x in zip(layouts, (q, k, v), strict=True):
        if layout is not None and (layout.dim != x.dim() - 2 or layout.outer != 1 or layout.inner != 1):
            refuse(name, f"has tokens split along dimension {layout.dim} of {x.dim()}, beside others")
    return _by_tokens(name, call, *layouts)


def _stacked(name: str, call: _Call) -> Tensor:
    """Tokens along a dimension that attention treats one by one (the batch: attention within each frame, say)."""
    operands = [call.q, call.k, call.v] + ([call.mask] if call.mask is not None else [])
    ndim = max(x.dim() for x in operands)
    layout = next((layout for layout in map(layout_of, operands) if layout is not None), None)
    assert layout is not None
    if call.gqa and layout.dim == ndim - 3:
        refuse(name, "with shared heads has tokens split along the heads")
    new, layout, back = aligned(name, operands)
    mask = new[3] if call.mask is not None else None
    out = call.run(new[0], new[1], new[2], mask, call.causal)
    _record(layout.region, "local", detail="tokens in the batch")
    return mark(out, moved(layout, out.dim() + back))


def _by_tokens(name: str, call: _Call, lq: Layout | None, lk: Layout | None, lv: Layout | None) -> Tensor:
    k, v = call.k, call.v
    if (lk is None) != (lv is None):  # one of them alone is whole
        k, lk = (gather(k, lk, used=lq is not None), None) if lk is not None else (k, None)
        v, lv = (gather(v, lv, used=lq is not None), None) if lv is not None else (v, None)
    if lq is None:
        region = next(layout.region for layout in (lk, layout_of(call.v), layout_of(call.k)) if layout is not None)
        k = gather(k, lk, used=False) if lk is not None else k
        v = gather(v, lv, used=False) if lv is not None else v
        _record(region, "whole", detail="queries are whole")
        return call.run(call.q, k, v, _whole_mask(call.mask, used=False), call.causal)
    if lk is None:
        _record(lq.region, "local", detail="keys and values are whole")
        return _rows(name, call, use(k, lq.region), use(v, lq.region), lq)
    assert lv is not None
    if not same_tokens(lk, lv):
        refuse(name, "has keys and values of different tokens")
    why: list[tuple[str, str]] = []
    region = lq.region
    if region.allgather == 1 and region.ring > 1:
        refusal = ring_refusal(call.q, k, v, region.ulysses, call.gqa)
        method = "hybrid" if region.ulysses > 1 else "ring"
        if not refusal:
            _record(region, method, why)
            mask = _ring_mask(name, call.mask, lq, lk)
            return ring(call.q, k, v, mask, call.causal, call.scale, call.gqa, lq, lk)
        why.append((method, refusal))
    if region.allgather == 1:
        refusal = _ulysses_refusal(call, region.size)
        if not refusal:
            _record(region, "ulysses", why)
            return _ulysses(name, call, lq, lk)
        why.append(("ulysses", refusal))
    else:
        why.append(("ulysses", "allgather_degree asks for gathered keys and values"))
    _record(region, "gather_kv", why)
    width = k.shape[-1]
    both = gather(torch.cat([k, v], -1), lk, used=True)
    return _rows(name, call, both[..., :width], both[..., width:], lq)


def _ulysses_refusal(call: _Call, size: int) -> str:
    if call.q.dim() != 4 or call.k.dim() != 4 or call.v.dim() != 4:
        return "no dimension of heads"
    for what, x in (("query", call.q), ("key", call.k), ("value", call.v)):
        if x.shape[1] % size:
            return f"{x.shape[1]} {what} heads do not divide over {size} ranks"
    return "" if call.q.shape[0] == call.k.shape[0] == call.v.shape[0] else "queries and keys differ in batch size"


def _record(region: Region, method: str, why: Sequence[tuple[str, str]] = (), detail: str = "") -> None:
    if not torch.compiler.is_compiling():
        module, source = caller()
        region.report.attentions.append(AttentionRecord(module, source, method, None, tuple(why), detail))


# --- masks ------------------------------------------------------------------------------------------------------------


def _whole_mask(mask: Tensor | None, *, used: bool) -> Tensor | None:
    """All rows and columns of a mask."""
    layout = layout_of(mask)
    return mask if mask is None or layout is None else gather(mask, layout, used=used)


def _check_columns(name: str, mask: Tensor, keys: int) -> None:
    if mask.shape[-1] not in (1, keys):
        refuse(
            name,
            f"has a mask for {mask.shape[-1]} keys, and there are {keys} in all.  A mask made from a local length is "
            "of no use: make it of the global one, or name it in the plan",
        )


def _row_mask(name: str, call: _Call, keys: int, lq: Layout) -> Tensor | None:
    """The mask for this rank's queries and all keys."""
    if call.causal:
        places = (list(lq.lengths), list(lq.whole), lq.region.rank, lq.region.size, call.q.device)
        rows: Tensor = _ops.positions.default(*places)
        return rows[:, None] >= torch.arange(keys, device=call.q.device)
    mask = call.mask
    if mask is None:
        return None
    layout = layout_of(mask)
    if layout is not None and layout.dim == mask.dim() - 2 and same_tokens(layout, lq):
        _check_columns(name, mask, keys)
        return mask
    per_row = mask.dim() >= 2 and mask.shape[-2] != 1
    if layout is not None:
        mask = gather(mask, layout, used=not per_row)
    elif not per_row:
        mask = use(mask, lq.region)
    assert mask is not None
    _check_columns(name, mask, keys)
    _check_rows(name, mask, sum(lq.lengths))
    # Rows are cut by `shard`, which gathers their gradient; a row for all queries has a summand on each rank.
    return shard(mask, moved(lq, mask.dim() - 2)) if per_row else mask


def _check_rows(name: str, mask: Tensor, queries: int) -> None:
    if mask.dim() >= 2 and mask.shape[-2] not in (1, queries):
        refuse(name, f"has a mask for {mask.shape[-2]} queries, and there are {queries} in all")


def _ring_mask(name: str, mask: Tensor | None, lq: Layout, lk: Layout) -> Tensor | None:
    """A mask that is whole, or split by rows like the queries."""
    if mask is None:
        return None
    layout = layout_of(mask)
    if layout is not None and not (layout.dim == mask.dim() - 2 and same_tokens(layout, lq)):
        mask, layout = gather(mask, layout, used=False), None
    _check_columns(name, mask, sum(lk.lengths))
    if layout is None:
        _check_rows(name, mask, sum(lq.lengths))
    return mask


def _rows(name: str, call: _Call, k: Tensor, v: Tensor, lq: Layout) -> Tensor:
    """This rank's queries against all keys."""
    out = call.run(call.q, k, v, _row_mask(name, call, k.shape[-2], lq), False)
    return mark(out, moved(lq, out.dim() - 2))


# --- Ulysses ----------------------------------------------------------------------------------------------------------


def _ulysses(name: str, call: _Call, lq: Layout, lk: Layout) -> Tensor:
    """Exchange tokens for heads, attend, exchange back; two all-to-alls where q, k and v can travel together."""
    q, k, v = to_heads(call.q, call.k, call.v, lq, lk, lq.region.size)
    region, mask = lq.region, call.mask
    if mask is not None:
        layout = layout_of(mask)
        mask = gather(mask, layout, used=True) if layout is not None else use(mask, region)
        assert mask is not None
        _check_columns(name, mask, sum(lk.lengths))
        _check_rows(name, mask, sum(lq.lengths))
        if mask.dim() >= 3 and mask.shape[-3] != 1:
            mask = _ops.take.default(mask, mask.dim() - 3, region.rank, region.size)
    return mark(to_tokens(call.run(q, k, v, mask, call.causal), lq, region.size), moved(lq, 2))
