"""What operators do to dimensions: broadcasting, reshapes, permutations and cuts.  Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from torch.fx import Node

from fxsp.passes.graph import Call
from fxsp.passes.rules.families import names_of
from fxsp.passes.rules.rule import Dims
from fxsp.types import Length, as_length, product, quotient, same_length

__all__ = ["aligned", "broadcast", "cut_bounds", "kept", "order", "position", "reshape_factors"]


def aligned(size: Length, result: Length) -> bool:
    """Whether an operand's dimension runs along the result's, not over a single element again and again.

    Two lengths of which it is not known that they are equal must be: a length of one would be known.
    """
    return same_length(size, result) or not same_length(size, 1)


def broadcast(
    shapes: list[tuple[Length, ...]], result: tuple[Length, ...], prefix: str = "d"
) -> tuple[list[Dims], Dims, dict[str, Length]]:
    """Factors of broadcast operands: one per result dimension; an operand's 1 against a larger size has none."""
    rank = len(result)
    sizes = {f"{prefix}{i}": n for i, n in enumerate(result)}
    out: Dims = tuple((f"{prefix}{i}",) for i in range(rank))
    operands: list[Dims] = []
    for shape in shapes:
        offset = rank - len(shape)
        operands.append(tuple(out[offset + i] if aligned(n, result[offset + i]) else () for i, n in enumerate(shape)))
    return operands, out, sizes


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


def kept(before: tuple[Length, ...], after: tuple[Length, ...]) -> dict[int, int] | None:
    """Of a reshape by which only dimensions of 1 come and go: result dimension -> operand dimension; else None."""
    real = [d for d, n in enumerate(before) if not same_length(n, 1)]
    new = [d for d, n in enumerate(after) if not same_length(n, 1)]
    if len(real) != len(new) or not all(same_length(before[a], after[b]) for a, b in zip(real, new, strict=True)):
        return None
    return dict(zip(new, real, strict=True))


def order(op: Any, arguments: Mapping[str, Any], rank: int) -> list[int]:
    """Of a permutation, in place or not: for each dimension of the result the operand's dimension that it is."""
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    dims = list(range(rank))
    if name in names_of("reversal"):
        return dims[::-1]
    if name == "permute":
        return [d % rank for d in arguments["dims"]]
    if name in names_of("move"):
        given = (arguments["source"], arguments["destination"])
        sources, targets = ([d % rank for d in ([x] if isinstance(x, int) else x)] for x in given)
        rest = iter(d for d in dims if d not in sources)
        return [sources[targets.index(d)] if d in targets else next(rest) for d in dims]
    first, second = (-2, -1) if name in names_of("matrix_transpose") else list(arguments.values())[1:3]
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def cut_bounds(call: Call, length: Length, dim: int) -> list[tuple[Length, Length]] | None:
    """Global ``[start, end)`` of every result along the cut dimension, or None if it is not a plain cut."""
    if "start" in call.arguments:  # slice, narrow, slice_scatter
        start = position(call.get("start"), 0, length)
        if "length" in call.arguments:
            end = None if start is None else _add(start, call["length"])
        else:
            if call.get("step", 1) != 1:
                return None
            end = position(call.get("end"), length, length)
        return None if start is None or end is None else [(start, end)]
    if "index" in call.arguments:  # select of a number that is known
        start = position(call["index"], 0, length) if isinstance(call["index"], int) else None
        return None if start is None else [(start, as_length(start + 1))]
    bounds: list[tuple[Length, Length]] = []
    for shape in call.result_shapes():
        before = bounds[-1][1] if bounds else 0
        bounds.append((before, as_length(before + shape[dim])))
    return bounds


def _number(value: Any) -> Length | None:
    if isinstance(value, Node):
        value = value.meta.get("val")
    try:
        return as_length(value)
    except (TypeError, ValueError):
        return None


def _add(a: Length, value: Any) -> Length | None:
    b = _number(value)
    return None if b is None else as_length(a + b)


def position(value: Any, default: Length, length: Length) -> Length | None:
    """A bound of a slice as a position, counted from the front; None where a symbolic bound cannot be placed."""
    if value is None:
        return default
    number = _number(value)
    if isinstance(number, int):
        if number < 0:
            return max(length + number, 0) if isinstance(length, int) else as_length(length + number)
        if number >= 2**62:
            return length
        return min(number, length) if isinstance(length, int) else number
    return number
