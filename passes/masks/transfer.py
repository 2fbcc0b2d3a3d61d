"""The terms of a graph: what each operator makes of those of its operands, by one table, assembled here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.graph import Call, shape_of, tensor_value
from fxsp.passes.masks import arithmetic, values
from fxsp.passes.masks.terms import Affine, Term, Where, simplified
from fxsp.passes.masks.values import Terms, Transfer, is_integer

__all__ = ["TABLE", "terms_of"]

#: Operator -> its transfer function.
TABLE: dict[Any, Transfer] = {
    op: function for ops, function in (*values.FUNCTIONS, *arithmetic.FUNCTIONS) for op in ops
}


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
