"""Rules of operators that rearrange dimensions: reshape, permute, expand, unsqueeze, and their spellings."""

from __future__ import annotations

import sympy
import torch

from fxsp.passes.rules.elementwise import aligned
from fxsp.passes.rules.rule import Call, Dims, OpRule, RuleFunction
from fxsp.types import Length, product, quotient, same_length

__all__ = ["RULES", "reshape_factors"]


def reshape_factors(
    before: tuple[Length, ...], after: tuple[Length, ...]
) -> tuple[Dims, Dims, dict[str, Length], set[str]]:
    """Common factors of two shapes with one number of elements, and the factors that have no counterpart.

    Dimensions are consumed from the left; where one divides the other it becomes a factor of it.  Where neither
    divides, the shortest group of dimensions with equal products is marked whole.  A dimension of 1 without a
    counterpart becomes a factor of its neighbour, of the one before it where there is a choice: a sequence of one token
    in ``[B, 1, C]`` stays with the batch in ``[B, C]``.
    """
    ins: list[list[str]] = [[] for _ in before]
    outs: list[list[str]] = [[] for _ in after]
    sizes: dict[str, Length] = {}
    whole: set[str] = set()

    def add(size: Length, i: int | None, j: int | None) -> str:
        name = f"f{len(sizes)}"
        sizes[name] = size
        if i is not None:
            ins[i].append(name)
        if j is not None:
            outs[j].append(name)
        return name

    i = j = 0
    left_in: Length | None = None
    left_out: Length | None = None
    while i < len(before) or j < len(after):
        if i == len(before):
            add(after[j], len(before) - 1 if before else None, j)
            j += 1
            continue
        if j == len(after):
            add(before[i], i, len(after) - 1 if after else None)
            i += 1
            continue
        a = before[i] if left_in is None else left_in
        b = after[j] if left_out is None else left_out
        if same_length(a, b):
            add(a, i, j)
            i, j, left_in, left_out = i + 1, j + 1, None, None
        elif same_length(a, 1):
            add(1, i, j - 1 if j and left_out is None else j)
            i, left_in = i + 1, None
        elif same_length(b, 1):
            add(1, i - 1 if i and left_in is None else i, j)
            j, left_out = j + 1, None
        elif (ratio := quotient(a, b)) is not None:
            add(b, i, j)
            left_in, j, left_out = ratio, j + 1, None
        elif (ratio := quotient(b, a)) is not None:
            add(a, i, j)
            left_out, i, left_in = ratio, i + 1, None
        else:
            # No common factor at this place: close the group of dimensions at the next equal product.
            end_i, end_j = i + 1, j + 1
            got_in, got_out = a, b
            while not same_length(got_in, got_out) and (end_i < len(before) or end_j < len(after)):
                if end_j >= len(after) or (end_i < len(before) and _smaller(got_in, got_out)):
                    got_in, end_i = product((got_in, before[end_i])), end_i + 1
                else:
                    got_out, end_j = product((got_out, after[end_j])), end_j + 1
            whole |= {add(a if d == i else before[d], d, None) for d in range(i, end_i)}
            whole |= {add(b if d == j else after[d], None, d) for d in range(j, end_j)}
            i, j, left_in, left_out = end_i, end_j, None, None
    return tuple(map(tuple, ins)), tuple(map(tuple, outs)), sizes, whole


def _smaller(a: Length, b: Length) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return bool((sympy.sympify(b) - sympy.sympify(a)).is_positive)


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


def _order(call: Call, rank: int) -> list[int]:
    """Result dimension -> operand dimension."""
    name = call.op._schema.name.removeprefix("aten::")
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = list(range(rank))
        first, second = (call.dim(n, rank) for n in list(call.arguments)[1:3])
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    if name == "permute":
        return [d % rank for d in call["dims"]]
    if name in ("mT", "mH", "adjoint", "matrix_H"):
        return [*range(rank - 2), rank - 1, rank - 2]
    if name in ("movedim", "moveaxis"):
        source, target = call["source"], call["destination"]
        sources = [d % rank for d in ([source] if isinstance(source, int) else source)]
        targets = [d % rank for d in ([target] if isinstance(target, int) else target)]
        dims = [-1] * rank
        for s, t in zip(sources, targets, strict=True):
            dims[t] = s
        rest = iter(d for d in range(rank) if d not in sources)
        return [next(rest) if d < 0 else d for d in dims]
    return list(range(rank))[::-1]  # t, numpy_T


def permute(call: Call) -> OpRule | None:
    """``transpose(1, 2)``: ``([d0, d1, d2]) -> ([d0, d2, d1])``."""
    (shape,) = call.operand_shapes()
    dims: Dims = tuple((f"d{i}",) for i in range(len(shape)))
    order = _order(call, len(shape))
    return OpRule((dims,), (tuple(dims[d] for d in order),), {f"d{i}": n for i, n in enumerate(shape)})


def expand(call: Call) -> OpRule | None:
    """``expand`` to ``[b, n, c]`` from ``[b, 1, c]``: ``([d0, 1, d2]) -> ([d0, d1, d2])``."""
    (result,) = call.result_shapes()
    rank = len(result)
    out: Dims = tuple((f"d{i}",) for i in range(rank))
    shape = call.operand_shapes()[0]
    offset = rank - len(shape)
    dims = tuple(out[offset + i] if aligned(n, result[offset + i]) else () for i, n in enumerate(shape))
    others: tuple[None, ...] = (None,) * (len(call.operands) - 1)  # expand_as reads a shape only
    return OpRule((dims, *others), (out,), {f"d{i}": n for i, n in enumerate(result)})


def view_as_complex(call: Call) -> OpRule | None:
    """``([d0, d1, c]) -> ([d0, d1]) whole={c}``."""
    (shape,) = call.operand_shapes()
    dims: Dims = tuple((f"d{i}",) for i in range(len(shape) - 1))
    sizes = {f"d{i}": n for i, n in enumerate(shape[:-1])} | {"c": shape[-1]}
    return OpRule(((*dims, ("c",)),), (dims,), sizes, whole=frozenset("c"))


def view_as_real(call: Call) -> OpRule | None:
    """``([d0, d1]) -> ([d0, d1, c]) whole={c}``."""
    (shape,) = call.operand_shapes()
    dims: Dims = tuple((f"d{i}",) for i in range(len(shape)))
    sizes = {f"d{i}": n for i, n in enumerate(shape)} | {"c": 2}
    return OpRule((dims,), ((*dims, ("c",)),), sizes, whole=frozenset("c"))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "reshape": reshape,
    "permute": permute,
    "expand": expand,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
}
