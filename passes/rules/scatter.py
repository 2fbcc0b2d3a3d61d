"""Rules of operators that write to positions: scatter, index_put, index_add and their kin.

The dimension that is written to is whole, and so are the positions along it; all others pass.
"""

from __future__ import annotations

from torch.fx import Node

from fxsp.passes.graph import Call, shape_of
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction
from fxsp.types import same_length

__all__ = ["RULES"]


def scatter(call: Call) -> OpRule | None:
    """``scatter_add(x, 1, i, y)``: ``([d0, w], [d0, n], [d0, m]) -> ([d0, w]) whole={m, n, w}``."""
    shapes = call.operand_shapes()
    rank = len(shapes[0])
    if rank == 0 or any(len(s) != rank for s in shapes):
        return None
    dim = call.dim("dim", rank)
    operands: list[list[tuple[str, ...]]] = [[] for _ in shapes]
    for i in range(rank):
        together = i != dim and all(same_length(s[i], shapes[0][i]) for s in shapes)
        for k in range(len(shapes)):
            name = f"d{i}" if together else f"{'xiy'[k]}{i}"
            operands[k].append((name,))
    dims = tuple(tuple(o) for o in operands)
    return OpRule(dims, (dims[0],), whole=frozenset(f for o in dims for (f,) in o if f[0] != "d"))


def index_add(call: Call) -> OpRule | None:
    """``index_add(x, 1, i, y)``: ``([d0, w], [n], [d0, n]) -> ([d0, w]) whole={n, w}``."""
    shape, index, *rest = call.operand_shapes()
    if not shape or len(index) > 1:
        return None
    dim = call.dim("dim", len(shape))
    dims: Dims = tuple(("w",) if i == dim else (f"d{i}",) for i in range(len(shape)))
    places: Dims = (("n",),) if index else ()
    operands: list[Dims] = [dims, places]
    for source in rest:
        if source and len(source) != len(shape):
            return None
        operands.append(tuple(("n",) if i == dim else d for i, d in enumerate(dims)) if source else ())
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
    dims: list[tuple[str, ...]] = [(f"w{i}",) if i in used else (f"d{i}",) for i in range(len(shape))]
    written = [*dims[: used[0]], *((f"n{i}",) for i in range(rank)), *dims[used[-1] + 1 :]]
    offset = len(written) - len(values)
    if offset < 0:
        return None
    whole = {f"w{i}" for i in used} | {f"n{i}" for i in range(rank)}
    source: list[tuple[str, ...]] = []
    for d, n in zip(written[offset:], values, strict=True):
        # Values are broadcast; what lies along the written positions is whole anyway.
        fits = d[0][0] == "n" or same_length(n, shape[int(d[0][1:])])
        source.append(d if fits else ())
    operands: list[Dims] = [tuple(dims)]
    operands += [tuple((f"n{rank - len(s) + i}",) for i in range(len(s))) for s in shapes]
    operands.append(tuple(source))
    known = {f for o in operands for d in o for f in d}
    return OpRule(tuple(operands), (tuple(dims),), whole=frozenset(whole & known))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "scatter": scatter,
    "index_add": index_add,
    "index_put": index_put,
}
