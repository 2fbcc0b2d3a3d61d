"""Rules of operators that select, repeat, join, look up or write to positions.

Along the dimension that they work on everything must be whole (joining and cutting a *sharded* dimension at segment
boundaries is the business of ``fxsp.passes.special.cat_and_cut``); all other dimensions pass.
"""

from __future__ import annotations

from fxsp.passes.graph import Call, shape_of
from fxsp.passes.rules.dims import aligned
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction, passing, rows
from fxsp.types import Length, same_length

__all__ = ["RULES"]


def cut(call: Call) -> OpRule | None:
    """``chunk(2, dim=2)``: ``([d0, d1, d2]) -> ([d0, d1, w2], [d0, d1, w2]) whole={d2, w2}``."""
    (shape,) = call.operand_shapes()
    if call["dim"] is None or any(len(r) != len(shape) for r in call.result_shapes()):
        return None
    return passing(call, [call.dim("dim", len(shape))])


def select(call: Call) -> OpRule | None:
    """``select(1, 0)``: ``([d0, d1, d2]) -> ([d0, d2]) whole={d1}``."""
    (shape,) = call.operand_shapes()
    dims, dim = rows(len(shape)), call.dim("dim", len(shape))
    out = dims[:dim] + dims[dim + 1 :]
    return OpRule((dims,), tuple(out for _ in call.result_shapes()), whole=frozenset({f"d{dim}"}))


def cat(call: Call) -> OpRule | None:
    """``cat([x, y], 2)``: ``([d0, d1, x0], [d0, d1, x1]) -> ([d0, d1, y]) whole={x0, x1, y}``."""
    shapes = call.operand_shapes()
    (result,) = call.result_shapes()
    rank = len(result)
    if any(len(s) != rank for s in shapes):
        return None  # an empty 1-d tensor among the operands
    dim, joined = call.dim("dim", rank), [f"x{k}" for k in range(len(shapes))]
    operands = tuple(rows(rank, but={dim: name}) for name in joined)
    return OpRule(operands, (rows(rank, but={dim: "y"}),), whole=frozenset({"y", *joined}))


def stack(call: Call) -> OpRule | None:
    """``stack([x, y], 1)``: ``([d0, d1], [d0, d1]) -> ([d0, n, d1]) whole={n}``."""
    shapes = call.operand_shapes()
    dims, dim = rows(len(shapes[0])), call.dim("dim", len(shapes[0]) + 1)
    return OpRule(tuple(dims for _ in shapes), ((*dims[:dim], ("n",), *dims[dim:]),), whole=frozenset("n"))


def pad(call: Call) -> OpRule | None:
    """Padded dimensions are whole, the others pass."""
    (shape,) = call.operand_shapes()
    amounts = call["pad"]
    changed = [len(shape) - 1 - i // 2 for i in range(0, len(amounts), 2) if amounts[i : i + 2] != [0, 0]]
    return passing(call, changed)


def repeat(call: Call) -> OpRule | None:
    """Repeated dimensions are whole, the others pass."""
    (shape,) = call.operand_shapes()
    given = call["repeats"] if "repeats" in call.arguments else call["dims"]
    repeats = [*([1] * (len(shape) - len(given))), *given]  # tile may name fewer than there are
    extra = len(repeats) - len(shape)
    changed = [i for i in range(len(shape)) if not (isinstance(repeats[extra + i], int) and repeats[extra + i] == 1)]
    new = rows(extra, "n")
    out = (*new, *rows(len(shape), but={i: f"w{i}" for i in changed}))
    whole = {f"{x}{i}" for i in changed for x in "dw"} | {f for (f,) in new}
    return OpRule((rows(len(shape)),), (out,), whole=frozenset(whole))


def one_hot(call: Call) -> OpRule | None:
    """``([d0, d1]) -> ([d0, d1, n]) whole={n}``, with a given number of classes."""
    if not isinstance(call["num_classes"], int) or call["num_classes"] < 0:
        return None
    (shape,) = call.operand_shapes()
    dims = rows(len(shape))
    return OpRule((dims,), ((*dims, ("n",)),), whole=frozenset("n"))


def index_select(call: Call) -> OpRule | None:
    """``index_select(1, i)``: ``([d0, w, d2], [n]) -> ([d0, n, d2]) whole={w}``."""
    shape, index = call.operand_shapes()
    dim = call.dim("dim", len(shape))
    before, after = (rows(len(shape), but={dim: name}) for name in "wn")
    return OpRule((before, (("n",),) if index else ()), (after,), whole=frozenset("w"))


def _indexed(call: Call) -> dict[int, tuple[Length, ...]]:
    """The dimensions that one run of integer index tensors is for, and their shapes; of other indices nothing."""
    given = {i: n for i, n in enumerate(call["indices"]) if n is not None}
    dims, dtypes = list(given), [n.meta["val"].dtype for n in given.values()]
    # Boolean masks: how many elements are meant depends on data.
    if any(dtype.is_floating_point or dtype.itemsize == 1 for dtype in dtypes):
        return {}
    return {i: shape_of(n) for i, n in given.items()} if dims and dims == list(range(dims[0], dims[-1] + 1)) else {}


def index(call: Call) -> OpRule | None:
    """One run of integer index tensors ``x[:, i, j]``: ``([d0, w1, w2], [n0], [n0]) -> ([d0, n0]) whole={w1, w2}``."""
    shape, used = call.shape("self"), _indexed(call)
    if not used:
        return None
    (result,) = call.result_shapes()
    first, rank = min(used), len(result) - (len(shape) - len(used))
    new = rows(rank, "n")
    dims = rows(len(shape), but={i: f"w{i}" for i in used})
    places = [
        tuple(new[i] if aligned(n, result[first + i]) else () for i, n in enumerate(value, rank - len(value)))
        for value in used.values()
    ]
    out = (*dims[:first], *new, *dims[max(used) + 1 :])
    return OpRule((dims, *places), (out,), whole=frozenset(f"w{i}" for i in used))


def gather(call: Call) -> OpRule | None:
    """Positions along ``dim`` are looked up, the other dimensions are aligned where their sizes are equal."""
    shape, index = call.operand_shapes()
    if len(index) != len(shape) or not shape:
        return None
    dim = call.dim("dim", len(shape))
    apart = [i for i, (a, b) in enumerate(zip(shape, index, strict=True)) if i != dim and not same_length(a, b)]
    left = rows(len(shape), but={dim: "w", **{i: f"l{i}" for i in apart}})
    right = rows(len(shape), but={dim: "n", **{i: f"r{i}" for i in apart}})
    return OpRule((left, right), (right,), whole=frozenset({"w", *(f"{x}{i}" for i in apart for x in "lr")}))


def scatter_into(call: Call) -> OpRule | None:
    """``slice_scatter(x, y, dim)``: ``([d0, x], [d0, y]) -> ([d0, x]) whole={x, y}``."""
    shape, part = call.operand_shapes()
    dim = call.dim("dim", len(shape))
    dims = rows(len(shape), but={dim: "x"})
    if len(part) == len(shape):
        return OpRule((dims, rows(len(shape), but={dim: "y"})), (dims,), whole=frozenset("xy"))
    return OpRule((dims, dims[:dim] + dims[dim + 1 :]), (dims,), whole=frozenset("x"))


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
    shape, values, used = call.shape("self"), call.shape("values"), _indexed(call)
    if not used:
        return None
    rank = max(map(len, used.values()))
    dims, new = rows(len(shape), but={i: f"w{i}" for i in used}), rows(rank, "n")
    written = (*dims[: min(used)], *new, *dims[max(used) + 1 :])
    offset = len(written) - len(values)
    if offset < 0:
        return None
    whole = {f"w{i}" for i in used} | {f"n{i}" for i in range(rank)}
    # Values are broadcast; what lies along the written positions is whole anyway.
    source = tuple(
        d if d[0][0] == "n" or same_length(n, shape[int(d[0][1:])]) else ()
        for d, n in zip(written[offset:], values, strict=True)
    )
    operands = (dims, *(new[rank - len(s) :] for s in used.values()), source)
    known = {f for o in operands for d in o for f in d}
    return OpRule(operands, (dims,), whole=frozenset(whole & known))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "cut": cut,
    "select": select,
    "cat": cat,
    "stack": stack,
    "pad": pad,
    "repeat": repeat,
    "one_hot": one_hot,
    "index_select": index_select,
    "index": index,
    "gather": gather,
    "scatter_into": scatter_into,
    "scatter": scatter,
    "index_add": index_add,
    "index_put": index_put,
}
