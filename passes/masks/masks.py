"""masks: an attention mask that is computed from positions becomes what it means.

A causal mask that a model spells out is the causal flag, so that no rank holds ``[S, S]`` and a lowering may skip what
is masked; a mask that is the same for all queries (key padding, expanded to ``[B, 1, S, S]``) has one row again; a mask
that allows everything is none.  What a mask means is proven from the operators that compute it
(:mod:`fxsp.passes.masks.terms`), never read off names; where nothing is proven the mask stays as it is.

Input, as transformers traces without padding::

    %le  = le(%keys, %queries)        [1, 1, 5, 5], from two arange
    %sdpa = scaled_dot_product_attention(%q, %k, %v, %le)

Output::

    %sdpa = scaled_dot_product_attention(%q, %k, %v, None, 0.0, True)

What is causal and has a mask of keys besides, or a window, becomes ``fxsp_local.banded_attention``::

    %and  = and(%le, %keys)           [2, 1, 5, 5]
    %sdpa = scaled_dot_product_attention(%q, %k, %v, %and)

    %banded_attention = banded_attention(%q, %k, %v, %keys, True, None)     %keys [2, 1, 1, 5]

After this pass no attention has a mask that is the causal flag, or that repeats one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.attention.operators import BANDED, SDPA
from fxsp.passes.base import Pass, Program
from fxsp.passes.builder import Writer, erase_unused
from fxsp.passes.graph import Call, shape_of, tensor_value
from fxsp.passes.masks import arithmetic, values
from fxsp.passes.masks.terms import Affine, Leaf, Term, Where, equal, simplified
from fxsp.passes.masks.values import Terms, Transfer, is_integer
from fxsp.passes.rules.families import family
from fxsp.torch_internals import fake_mode_of
from fxsp.types import Length, same_length

__all__ = ["TABLE", "Band", "Masks", "band_of", "terms_of"]

aten = torch.ops.aten
#: Operator -> its transfer function.
TABLE: dict[Any, Transfer] = {
    op: function for ops, function in (*values.FUNCTIONS, *arithmetic.FUNCTIONS) for op in ops
}


@dataclass(frozen=True)
class Band:
    """What a mask allows: keys with ``low <= query - key <= high`` (None: no bound) that ``leaves`` allow too."""

    low: Length | None = None
    high: Length | None = None
    leaves: frozenset[Leaf] = frozenset()


class Masks(Pass):
    """After this pass a mask that is known to be causal is the flag, and one that repeats its rows has one."""

    def apply(self, program: Program) -> Program:
        attentions = [n for n in program.graph.nodes if n.target is SDPA and isinstance(Call(n)["attn_mask"], Node)]
        if not attentions:
            return program
        write = Writer(program.graph, fake_mode_of(attentions[0].meta["val"]))
        terms = terms_of(program.graph)
        rows: dict[Node, Node] = {}
        for node in attentions:
            _rewrite(write, Call(node), terms, rows)
        erase_unused(program.graph)
        program.gm.recompile()
        return program


def _rewrite(write: Writer, call: Call, terms: Terms, rows: dict[Node, Node]) -> None:
    mask = call["attn_mask"]
    queries, keys = call.shape("query")[-2], call.shape("key")[-2]
    band = band_of(mask, terms, queries, keys)
    changes: dict[str, Any] = {}
    if band == Band():
        changes = {"attn_mask": None}
    elif band == Band(0) and not call.get("is_causal"):
        changes = {"attn_mask": None, "is_causal": True}
    elif band is not None and _is_banded(call, band):
        row = next((_one_row(write, mask, leaf, rows) for leaf in band.leaves), None)
        arguments = [call[name] for name in ("query", "key", "value")]
        call.node.target = BANDED
        window = band.high if isinstance(band.high, int) else None
        call.node.args = (*arguments, row, True, window, call.get("scale"), bool(call.get("enable_gqa")))
        call.node.kwargs = {}
        return
    elif band is not None and band.low is band.high is None and len(band.leaves) == 1:
        (leaf,) = band.leaves
        changes = {"attn_mask": _one_row(write, mask, leaf, rows)}
    else:
        changes = {"attn_mask": _unexpanded(mask)}
    call.node.args, call.node.kwargs = call.rebuild(**changes)


def _is_banded(call: Call, band: Band) -> bool:
    """Whether this is causal, with a window or a mask of keys."""
    known = band.low == 0 and (band.high is None or (isinstance(band.high, int) and band.high >= 0))
    more = len(band.leaves) == 1 or (band.high is not None and not band.leaves)
    return known and more and not call.get("is_causal") and not call.get("dropout_p")


def band_of(mask: Node, terms: Terms, queries: Length, keys: Length) -> Band | None:
    """What ``mask`` is proven to allow, for an attention of so many queries and keys; None if that is not known."""
    term, value = terms.get(mask), mask.meta["val"]
    shape = shape_of(mask)
    if not isinstance(term, Where) or len(shape) < 2 or not same_length(shape[-1], keys):
        return None
    if not (same_length(shape[-2], queries) or same_length(shape[-2], 1)):
        return None
    ways = ((t, _allows(t, value.dtype)) for t in (term, term.flipped()) if t is not None)
    term, exact = next((way for way in ways if way[1] is not None), (term, None))
    if exact is None:
        return None
    low: Length | None = None
    high: Length | None = None
    leaves: set[Leaf] = set()
    for condition in term.conditions:
        if isinstance(condition, Leaf):
            if condition.dims[-2] is not None:
                return None
            leaves.add(condition)
            continue
        *outer, row, column = condition.coeffs
        if any(not equal(c, 0) for c in outer) or not equal(row + column, 0):
            return None
        if equal(row, 1) and low is None:
            low = -condition.const
        elif equal(column, 1) and high is None:
            high = condition.const
        else:
            return None
    if not exact and not (low == 0 and high is None and not leaves):
        # A large negative number is the same as minus infinity only where each query has a key.
        return None
    return Band(low, high, frozenset(leaves))


def _allows(term: Where, dtype: torch.dtype) -> bool | None:
    """Whether a mask excludes keys by minus infinity (True), or by the least number of its dtype (False); else None."""
    if dtype is torch.bool:
        return True if term.yes is True and (term.no is False or not term.conditions) else None
    if not dtype.is_floating_point or term.yes != 0:
        return None
    if not term.conditions or term.no == -math.inf:
        return True
    return False if dtype is not torch.float16 and term.no == torch.finfo(dtype).min else None


def _one_row(write: Writer, mask: Node, leaf: Leaf, rows: dict[Node, Node]) -> Node:
    """``[..., 1, S]``: the boolean tensor of ``leaf`` with its dimensions where the mask has them; once for a mask."""
    if mask in rows:
        return rows[mask]
    there = [d for d in leaf.dims if d is not None]
    # The other dimensions have size 1, or the tensor would differ along them.
    rest = [d for d in range(len(shape_of(leaf.node))) if d not in there]
    write.at(mask.next)
    with write.on_behalf_of(mask):
        new = write.call(aten.permute.default, leaf.node, [*rest, *there])
        for _ in rest:
            new = write.call(aten.squeeze.dim, new, 0)
        for i, d in enumerate(leaf.dims):
            if d is None:
                new = write.call(aten.unsqueeze.default, new, i)
        rows[mask] = write.call(aten.logical_not.default, new) if leaf.inverted else new
    return rows[mask]


def _unexpanded(mask: Node) -> Node:
    """The tensor that a mask repeats; attention repeats it by itself."""
    while mask.target in family("copy", "expand"):
        source = mask.args[0]
        assert isinstance(source, Node)
        # Fused kernels take masks of two or four dimensions: for three one device would do without one.
        if len(shape_of(source)) < 2 or (len(shape_of(source)) == 3 and len(shape_of(mask)) == 4):
            return mask
        mask = source
    return mask


def terms_of(graph: torch.fx.Graph) -> Terms:
    """The terms of all nodes that have one."""
    found: Terms = {}
    for node in graph.nodes:
        transfer = TABLE.get(node.target) if node.op == "call_function" else None
        if transfer is None or tensor_value(node) is None:
            continue
        term = transfer(Call(node), found)
        if term is not None:
            term = _fitted(simplified(term.aligned(len(shape_of(node))), shape_of(node)), node)
        if term is not None:
            found[node] = term
    return found


def _fitted(term: Term, node: Node) -> Term | None:
    """The term with its numbers in the node's dtype; None where that would round them."""
    dtype = node.meta["val"].dtype
    if isinstance(term, Affine):
        return term if is_integer(dtype) else None
    values = [_cast(v, dtype) for v in (term.yes, term.no)]
    return None if None in values else Where(term.conditions, *values)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return bool(value) if isinstance(value, (bool, int, float)) else None
    if dtype.is_floating_point:
        rounds = not isinstance(value, (bool, int, float)) or torch.finfo(dtype).max < abs(value) < math.inf
        return None if rounds else float(value)
    if is_integer(dtype):
        if isinstance(value, float):
            return int(value) if value.is_integer() else None
        return int(value) if isinstance(value, bool) else value
    return None
