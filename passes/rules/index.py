"""Rules of operators that select, repeat, join or look up positions.

Along the dimension that they work on everything must be whole (joining and cutting a *sharded* dimension at segment
boundaries is the business of ``fxsp.passes.special.cat_and_cut``); all other dimensions pass.
"""

from __future__ import annotations

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import aligned
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction, rows
from fxsp.types import as_length, same_length

__all__ = ["RULES"]


def _pass_except(call: Call, changed: dict[int, None] | list[int], operand: int = 0) -> OpRule | None:
    """One operand and results of its rank: the ``changed`` dimensions are whole, the others pass."""
    dims = rows(len(call.operand_shapes()[operand]))
    out = tuple((f"w{i}",) if i in changed else d for i, d in enumerate(dims))
    whole = {f for i in changed for f in (f"d{i}", f"w{i}")}
    return OpRule((tuple(dims),), tuple(out for _ in call.result_shapes()), whole=frozenset(whole))


def cut(call: Call) -> OpRule | None:
    """``chunk(2, dim=2)``: ``([d0, d1, d2]) -> ([d0, d1, w2], [d0, d1, w2]) whole={d2, w2}``."""
    (shape,) = call.operand_shapes()
    if call.get("dim", call.get("dimension", 0)) is None:
        return None
    dim = call.dim("dimension" if "dimension" in call.arguments else "dim", len(shape))
    if any(len(r) != len(shape) for r in call.result_shapes()):
        return None
    return _pass_except(call, [dim])


def select(call: Call) -> OpRule | None:
    """``select(1, 0)``: ``([d0, d1, d2]) -> ([d0, d2]) whole={d1}``."""
    (shape,) = call.operand_shapes()
    dim = call.dim("dim", len(shape))
    dims = rows(len(shape))
    out = tuple(d for i, d in enumerate(dims) if i != dim)
    return OpRule((tuple(dims),), tuple(out for _ in call.result_shapes()), whole=frozenset({f"d{dim}"}))


def cat(call: Call) -> OpRule | None:
    """``cat([x, y], 2)``: ``([d0, d1, x0], [d0, d1, x1]) -> ([d0, d1, y]) whole={x0, x1, y}``."""
    shapes = call.operand_shapes()
    (result,) = call.result_shapes()
    rank = len(result)
    if any(len(s) != rank for s in shapes):
        return None  # an empty 1-d tensor among the operands
    dim = call.dim("dim", rank)
    operands: list[Dims] = [
        tuple((f"x{k}",) if i == dim else (f"d{i}",) for i in range(rank)) for k in range(len(shapes))
    ]
    out: Dims = tuple(("y",) if i == dim else (f"d{i}",) for i in range(rank))
    return OpRule(tuple(operands), (out,), whole=frozenset({"y", *(f"x{k}" for k in range(len(shapes)))}))


def stack(call: Call) -> OpRule | None:
    """``stack([x, y], 1)``: ``([d0, d1], [d0, d1]) -> ([d0, n, d1]) whole={n}``."""
    shapes = call.operand_shapes()
    dim = call.dim("dim", len(shapes[0]) + 1)
    dims = rows(len(shapes[0]))
    out = (*dims[:dim], ("n",), *dims[dim:])
    return OpRule(tuple(tuple(dims) for _ in shapes), (out,), whole=frozenset("n"))


def pad(call: Call) -> OpRule | None:
    """Padded dimensions are whole, the others pass."""
    (shape,) = call.operand_shapes()
    amounts = call["pad"]
    changed = [len(shape) - 1 - i // 2 for i in range(0, len(amounts), 2) if amounts[i : i + 2] != [0, 0]]
    return _pass_except(call, changed)


def repeat(call: Call) -> OpRule | None:
    """Repeated dimensions are whole, the others pass."""
    (shape,) = call.operand_shapes()
    given = call["repeats"] if "repeats" in call.arguments else call["dims"]
    repeats = [*([1] * (len(shape) - len(given))), *given]  # tile may name fewer than there are
    extra = len(repeats) - len(shape)
    dims = rows(len(shape))
    changed = [i for i in range(len(shape)) if not (isinstance(repeats[extra + i], int) and repeats[extra + i] == 1)]
    new = rows(extra, "n")
    out = (*new, *((f"w{i}",) if i in changed else d for i, d in enumerate(dims)))
    whole = {f for i in changed for f in (f"d{i}", f"w{i}")} | {f for d in new for f in d}
    return OpRule((tuple(dims),), (out,), whole=frozenset(whole))


def one_hot(call: Call) -> OpRule | None:
    """``([d0, d1]) -> ([d0, d1, n]) whole={n}``, with a given number of classes."""
    if not isinstance(call["num_classes"], int) or call["num_classes"] < 0:
        return None
    (shape,) = call.operand_shapes()
    dims = rows(len(shape))
    return OpRule((tuple(dims),), ((*dims, ("n",)),), whole=frozenset("n"))


def index_select(call: Call) -> OpRule | None:
    """``index_select(1, i)``: ``([d0, w, d2], [n]) -> ([d0, n, d2]) whole={w}``."""
    shape, index = call.operand_shapes()
    dim = call.dim("dim", len(shape))
    dims: list[tuple[str, ...]] = [("w",) if i == dim else (f"d{i}",) for i in range(len(shape))]
    out = [("n",) if i == dim else d for i, d in enumerate(dims)]
    return OpRule((tuple(dims), (("n",),) if index else ()), (tuple(out),), whole=frozenset("w"))


def index(call: Call) -> OpRule | None:
    """One run of integer index tensors ``x[:, i, j]``: ``([d0, w1, w2], [n0], [n0]) -> ([d0, n0]) whole={w1, w2}``."""
    shape = call.shape("self")
    indices = list(call["indices"]) + [None] * (len(shape) - len(call["indices"]))
    used = [i for i, n in enumerate(indices) if n is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    values = [indices[i].meta["val"] for i in used]
    if any(v.dtype.is_floating_point or v.dtype.itemsize == 1 for v in values):
        return None  # boolean masks select a number of elements that depends on data
    (result,) = call.result_shapes()
    rank = len(result) - (len(shape) - len(used))
    new = rows(rank, "n")
    dims: list[tuple[str, ...]] = [(f"w{i}",) if i in used else (f"d{i}",) for i in range(len(shape))]
    operands: list[Dims] = [tuple(dims)]
    for value in values:
        offset = rank - value.dim()
        from_right = tuple(
            new[offset + i] if aligned(as_length(n), result[used[0] + offset + i]) else ()
            for i, n in enumerate(value.shape)
        )
        operands.append(from_right)
    out = [*dims[: used[0]], *new, *dims[used[-1] + 1 :]]
    return OpRule(tuple(operands), (tuple(out),), whole=frozenset(f"w{i}" for i in used))


def gather(call: Call) -> OpRule | None:
    """Positions along ``dim`` are looked up, the other dimensions are aligned where their sizes are equal."""
    shape, index = call.operand_shapes()
    if len(index) != len(shape) or not shape:
        return None
    dim = call.dim("dim", len(shape))
    left: list[tuple[str, ...]] = []
    right: list[tuple[str, ...]] = []
    whole = {"w"}
    for i, (a, b) in enumerate(zip(shape, index, strict=True)):
        if i == dim:
            left.append(("w",))
            right.append(("n",))
        elif same_length(a, b):
            left.append((f"d{i}",))
            right.append((f"d{i}",))
        else:
            left.append((f"l{i}",))
            right.append((f"r{i}",))
            whole |= {f"l{i}", f"r{i}"}
    return OpRule((tuple(left), tuple(right)), (tuple(right),), whole=frozenset(whole))


def scatter_into(call: Call) -> OpRule | None:
    """``slice_scatter(x, y, dim)``: ``([d0, x], [d0, y]) -> ([d0, x]) whole={x, y}``."""
    shape, part = call.operand_shapes()
    dim = call.dim("dim", len(shape))
    dims: list[tuple[str, ...]] = [("x",) if i == dim else (f"d{i}",) for i in range(len(shape))]
    inner = (
        [("y",) if i == dim else d for i, d in enumerate(dims)]
        if len(part) == len(shape)
        else [d for i, d in enumerate(dims) if i != dim]
    )
    whole = {"x", "y"} if len(part) == len(shape) else {"x"}
    return OpRule((tuple(dims), tuple(inner)), (tuple(dims),), whole=frozenset(whole))


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
}
