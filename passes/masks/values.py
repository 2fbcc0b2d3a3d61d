"""How operators carry terms (:mod:`fxsp.passes.masks.terms`) from operands to result: constants, copies and views.

One function per family of operators, in a table; an operator that is not in the table has a result without a term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.graph import Call, shape_of, tensor_value
from fxsp.passes.masks.terms import Affine, Leaf, Source, Term, Where, equal, minimum, remapped
from fxsp.passes.rules.dims import kept, order, position
from fxsp.passes.rules.families import family
from fxsp.types import Length, as_length, same_length

__all__ = ["TABLE", "Terms", "Transfer", "affine_of", "is_integer", "number_of", "on", "where_of"]

aten = torch.ops.aten
Terms = dict[Node, Term]
Transfer = Callable[[Call, Terms], "Term | None"]
TABLE: dict[Any, Transfer] = {}


def on(*ops: Any, table: dict[Any, Transfer] = TABLE) -> Callable[[Transfer], Transfer]:
    """Put a function into a table, for these operators."""

    def register(function: Transfer) -> Transfer:
        table.update(dict.fromkeys(ops, function))
        return function

    return register


def is_integer(dtype: torch.dtype) -> bool:
    """Whether affine terms are held in this dtype."""
    return dtype in (torch.int64, torch.int32)


def number_of(value: Any) -> Any:
    """A number, or the length behind a symbolic one."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return as_length(value)
    return value if isinstance(value, (bool, int, float)) else None


def where_of(value: Any, terms: Terms) -> Where | None:
    """An operand as a term with two values; a boolean tensor that is not known further is one."""
    if not isinstance(value, Node) or tensor_value(value) is None:
        number = number_of(value)
        return None if number is None else Where(frozenset(), number, number)
    term = terms.get(value)
    if term is None and value.meta["val"].dtype is torch.bool:
        dims = tuple(None if same_length(n, 1) else d for d, n in enumerate(shape_of(value)))
        return Where(frozenset([Leaf(value, dims)]), True, False)
    return term if isinstance(term, Where) else None


def affine_of(value: Any, terms: Terms) -> Affine | None:
    """An operand as an affine term: an integer, or a tensor that holds one."""
    if isinstance(value, Node) and tensor_value(value) is not None:
        term = terms.get(value)
        if isinstance(term, Where):
            whole = not term.conditions and is_integer(value.meta["val"].dtype)
            return Affine(term.yes, (0,) * len(shape_of(value))) if whole else None
        return term
    number = number_of(value)
    return None if number is None or isinstance(number, (bool, float)) else Affine(number, ())


# Where numbers come from.


@on(*family("arange"))
def _arange(call: Call, terms: Terms) -> Term | None:
    start, step = (number_of(call.get(n, d)) for n, d in (("start", 0), ("step", 1)))
    return None if None in (start, step) or float in (type(start), type(step)) else Affine(start, (step,))


@on(*family("full", "ones", "zeros"))
def _constant(call: Call, terms: Terms) -> Term | None:
    value = 1 if call.op in family("ones") else 0 if call.op in family("zeros") else None
    value = number_of(call.get("fill_value", call.get("s"))) if value is None else value
    return None if value is None else Where(frozenset(), value, value)


# Views and copies.


def _view(call: Call, terms: Terms, sources: list[Source | None], fixed: dict[int, Length]) -> Term | None:
    x = call.operands[0]
    term = terms.get(x) or where_of(x, terms)
    return None if term is None else remapped(term, sources, fixed, shape_of(x))


@on(*family("same_values"))
def _same(call: Call, terms: Terms) -> Term | None:
    x = call.operands[0]
    if call.node.meta["val"].dtype is torch.bool and x.meta["val"].dtype is not torch.bool and x not in terms:
        return None  # a new boolean tensor
    term = terms.get(x) or where_of(x, terms)
    if isinstance(term, Affine) and not is_integer(call.node.meta["val"].dtype):
        return None
    return term


@on(*family("reshape"))
def _reshape(call: Call, terms: Terms) -> Term | None:
    """Where only dimensions of 1 come and go, the others keep their order."""
    before, after = shape_of(call.operands[0]), shape_of(call.node)
    found = kept(before, after)
    if found is None:
        return None
    sources: list[Source | None] = [(found[d], 0, 1) if d in found else None for d in range(len(after))]
    return _view(call, terms, sources, {d: 0 for d in range(len(before)) if d not in found.values()})


@on(*family("permute"))
def _permute(call: Call, terms: Terms) -> Term | None:
    rank = len(shape_of(call.operands[0]))
    return _view(call, terms, [(d, 0, 1) for d in order(call.op, call.arguments, rank)], {})


@on(*family("expand"))
def _expand(call: Call, terms: Terms) -> Term | None:
    new = len(shape_of(call.node)) - len(shape_of(call.operands[0]))
    return _view(call, terms, [None if d < new else (d - new, 0, 1) for d in range(len(shape_of(call.node)))], {})


@on(aten.repeat.default)
def _repeat(call: Call, terms: Terms) -> Term | None:
    before = shape_of(call.operands[0])
    times = [number_of(n) for n in call["repeats"]][-len(before) :] if before else []
    same = all(same_length(n, 1) or (t is not None and equal(t, 1)) for n, t in zip(before, times, strict=True))
    return _expand(call, terms) if same else None


@on(*family("slice"))
def _slice(call: Call, terms: Terms) -> Term | None:
    shape = shape_of(call.operands[0])
    dim = call.dim("dim", len(shape))
    given, step = (number_of(x) for x in (call.get("start") or 0, call.get("step", 1)))
    if isinstance(given, int) and given < 0 and not isinstance(shape[dim], int):
        return None  # counted from the end, and cut at the front
    start = position(given, 0, shape[dim])
    if given is None or start is None or step is None:
        return None
    whole = [(d, start if d == dim else 0, step if d == dim else 1) for d in range(len(shape))]
    if start == 0 and step == 1 and not same_length(shape_of(call.node)[dim], shape[dim]):
        return _shortened(call, terms, dim, whole)
    return _view(call, terms, list(whole), {})


def _shortened(call: Call, terms: Terms, dim: int, sources: list[Source]) -> Term | None:
    """The first rows: affine terms stay, a boolean tensor would be a part of itself."""
    term = terms.get(call.operands[0])
    if isinstance(term, Where) and any(isinstance(c, Leaf) and c.dims[dim] is not None for c in term.conditions):
        return None
    return None if term is None else remapped(term, list(sources), {}, shape_of(call.operands[0]))


@on(aten.select.int)
def _select(call: Call, terms: Terms) -> Term | None:
    shape = shape_of(call.operands[0])
    dim, index = call.dim("dim", len(shape)), number_of(call["index"])
    if index is None:
        return None
    index = as_length(index + shape[dim]) if isinstance(index, int) and index < 0 else index
    return _view(call, terms, [(d, 0, 1) for d in range(len(shape)) if d != dim], {dim: index})


@on(aten.index.Tensor)
def _index(call: Call, terms: Terms) -> Term | None:
    """``x[i, j]`` with indices that are affine themselves: transformers looks up its padding mask so."""
    x, indices = call["self"], call["indices"]
    shape, out = shape_of(x), shape_of(call.node)
    found = [affine_of(i, terms) for i in indices if isinstance(i, Node)]
    if len(indices) != len(found) or len(found) != len(shape) or not found:
        return None
    at = [i.aligned(len(out)) for i in found if i is not None]
    if len(at) != len(found) or any(_may_wrap(i, out) for i in at):
        return None
    term = terms.get(x) or where_of(x, terms)
    if isinstance(term, Where):
        new = [_looked_up(c, at, shape, out) for c in term.conditions]
        return None if None in new else Where(frozenset(c for c in new if c is not None), term.yes, term.no)
    return None if term is None else _substituted(term, at, len(out))


def _may_wrap(index: Affine, shape: tuple[Length, ...]) -> bool:
    """A negative index counts from the end."""
    low = minimum(index, shape)
    return not (isinstance(low, int) and low >= 0)


def _substituted(term: Affine, at: list[Affine], rank: int) -> Affine:
    result = Affine(term.const, (0,) * rank)
    for coeff, index in zip(term.coeffs, at, strict=True):
        result = result.plus(index, coeff)
    return result


def _looked_up(
    condition: Affine | Leaf, at: list[Affine], shape: tuple[Length, ...], out: tuple[Length, ...]
) -> Affine | Leaf | None:
    if isinstance(condition, Affine):
        return _substituted(condition, at, len(out))
    dims: list[int | None] = [None] * len(out)
    for d, index in enumerate(at):
        if condition.dims[d] is None:
            continue
        along = [i for i, c in enumerate(index.coeffs) if not equal(c, 0)]
        identity = len(along) == 1 and equal(index.coeffs[along[0]], 1) and equal(index.const, 0)
        if not identity or not same_length(out[along[0]], shape[d]) or dims[along[0]] is not None:
            return None
        dims[along[0]] = condition.dims[d]
    return Leaf(condition.node, tuple(dims), condition.inverted)
