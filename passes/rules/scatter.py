"""Rules of operators that write to positions: scatter, index_put, index_add and their kin.

The dimension that is written to is whole, and so are the positions along it; all others pass.
"""

from __future__ import annotations

from torch.fx import Node

from fxsp.passes.graph import Call, shape_of
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction, rows
from fxsp.types import same_length

__all__ = ["RULES"]


def scatter(call: Call) -> OpRule | None:
    """``scatter_add(x, 1, i, y)``: ``([d0, w], [d0, n], [d0, m]) -> ([d0, w]) whole={m, n, w}``."""
    shapes = call.operand_shapes()
    rank = len(shapes[0])
    if rank == 0 or any(len(s) != rank for s in shapes):
        return None
    dim = call.dim("dim", rank)
    apart = [i for i in range(rank) if i == dim or not all(same_length(s[i], shapes[0][i]) for s in shapes)]
    names = "xiy"[: len(shapes)]
    operands = tuple(rows(rank, but={i: f"{x}{i}" for i in apart}) for x in names)
    return OpRule(operands, operands[:1], whole=frozenset(f"{x}{i}" for i in apart for x in names))


def index_add(call: Call) -> OpRule | None:
    """``index_add(x, 1, i, y)``: ``([d0, w], [n], [d0, n]) -> ([d0, w]) whole={n, w}``."""
    shape, index, *rest = call.operand_shapes()
    if not shape or len(index) > 1:
        return None
    dim = call.dim("dim", len(shape))
    dims = rows(len(shape), but={dim: "w"})
    places: Dims = (("n",),) if index else ()
    operands: list[Dims] = [dims, places]
    for source in rest:
        if source and len(source) != len(shape):
            return None
        operands.append(rows(len(shape), but={dim: "n"}) if source else ())
    known = {f for d in operands for dim_ in d for f in dim_}
    return OpRule(tuple(operands), (dims,), whole=frozenset({"n", "w"} & known))


def index_put(call: Call) -> OpRule | None:
    """One run of integer index tensors ``x[:, i] = y``: ``([d0, w1], [n0], [d0, n0]) -> ([d0, w1]) whole={n0, w1}``."""
    shape, values = call.shape("self"), call.shape("values")
    given = list(call["indices"])
    indices = given + [None] * (len(shape) - len(given))
    used = [i for i, n in enumerate(indices) if n is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    index_nodes: list[Node] = [indices[i] for i in used]
    if any(n.meta["val"].dtype.itemsize == 1 or n.meta["val"].dtype.is_floating_point for n in index_nodes):
        return None  # boolean masks: how many elements are written depends on data
    shapes = [shape_of(n) for n in index_nodes]
    rank = max(len(s) for s in shapes)
    dims, new = rows(len(shape), but={i: f"w{i}" for i in used}), rows(rank, "n")
    written = (*dims[: used[0]], *new, *dims[used[-1] + 1 :])
    offset = len(written) - len(values)
    if offset < 0:
        return None
    whole = {f"w{i}" for i in used} | {f"n{i}" for i in range(rank)}
    # Values are broadcast; what lies along the written positions is whole anyway.
    source = tuple(
        d if d[0][0] == "n" or same_length(n, shape[int(d[0][1:])]) else ()
        for d, n in zip(written[offset:], values, strict=True)
    )
    operands = (dims, *(new[rank - len(s) :] for s in shapes), source)
    known = {f for o in operands for d in o for f in d}
    return OpRule(operands, (dims,), whole=frozenset(whole & known))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "scatter": scatter,
    "index_add": index_add,
    "index_put": index_put,
}
