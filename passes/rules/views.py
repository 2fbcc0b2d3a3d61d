"""Rules of operators that rearrange dimensions: reshape, permute, expand, unsqueeze, and their spellings."""

from __future__ import annotations

import torch

from fxsp.passes.rules.dims import order, reshape_factors
from fxsp.passes.rules.rule import Call, Dims, OpRule, RuleFunction
from fxsp.types import same_length

__all__ = ["RULES"]


def _unsqueeze(call: Call) -> OpRule | None:
    """``unsqueeze(1)``: ``([d0, d1]) -> ([d0, 1, d1])``; which 1 is the new one is known, also beside one token."""
    shape = call.operand_shapes()[0]
    dims: list[tuple[str, ...]] = [(f"d{i}",) for i in range(len(shape))]
    at = call.dim("dim", len(shape) + 1)
    out = (*dims[:at], (), *dims[at:])
    return OpRule((tuple(dims),), (out,), {f"d{i}": n for i, n in enumerate(shape)})


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
    (shape,) = call.operand_shapes()
    dims: Dims = tuple((f"d{i}",) for i in range(len(shape)))
    moved = order(call.op, call.arguments, len(shape))
    return OpRule((dims,), (tuple(dims[d] for d in moved),), {f"d{i}": n for i, n in enumerate(shape)})


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "reshape": reshape,
    "permute": permute,
}
