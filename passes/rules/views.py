"""Rules of operators that rearrange dimensions: reshape, permute, expand, unsqueeze, and their spellings."""

from __future__ import annotations

import torch

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import order, reshape_factors
from fxsp.passes.rules.rule import OpRule, RuleFunction, rows
from fxsp.types import same_length

__all__ = ["RULES"]


def _unsqueeze(call: Call) -> OpRule | None:
    """``unsqueeze(1)``: ``([d0, d1]) -> ([d0, 1, d1])``; which 1 is the new one is known, also beside one token."""
    dims = rows(len(call.operand_shapes()[0]))
    at = call.dim("dim", len(dims) + 1)
    return OpRule((dims,), ((*dims[:at], (), *dims[at:]),))


def reshape(call: Call) -> OpRule | None:
    """``flatten``: ``([f0, f1, f2]) -> ([f0 f1, f2])``."""
    if call.op is torch.ops.aten.unsqueeze.default:
        return _unsqueeze(call)
    before, (after,) = call.operand_shapes()[0], call.result_shapes()
    if any(same_length(n, 0) for n in before):
        return None
    ins, outs, sizes, whole = reshape_factors(before, after)
    others: tuple[None, ...] = (None,) * (len(call.operands) - 1)  # view_as reads a shape only
    return OpRule((ins, *others), (outs,), sizes, whole=frozenset(whole))


def permute(call: Call) -> OpRule | None:
    """``transpose(1, 2)``: ``([d0, d1, d2]) -> ([d0, d2, d1])``."""
    dims = rows(len(call.operand_shapes()[0]))
    return OpRule((dims,), (tuple(dims[d] for d in order(call.op, call.arguments, len(dims))),))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "reshape": reshape,
    "permute": permute,
}
