"""How operators carry terms (:mod:`fxsp.passes.masks.terms`) from operands to result: constants, copies and views.

One function for a family of operators; an operator that has none has a result without a term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.graph import Call, shape_of, tensor_value
from fxsp.passes.masks.terms import Affine, Leaf, Term, Where, equal, minimum, substituted
from fxsp.passes.rules.dims import kept, order, position
from fxsp.passes.rules.families import family, overloads
from fxsp.types import Length, as_length, same_length

__all__ = ["FUNCTIONS", "Terms", "Transfer", "affine_of", "is_integer", "number_of", "unit", "where_of"]

Terms = dict[Node, Term]
Transfer = Callable[[Call, Terms], "Term | None"]


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


def _arange(call: Call, terms: Terms) -> Term | None:
    start, step = (number_of(call.get(n, d)) for n, d in (("start", 0), ("step", 1)))
    return None if None in (start, step) or float in (type(start), type(step)) else Affine(start, (step,))


def _constant(call: Call, terms: Terms) -> Term | None:
    value = 1 if call.op in family("ones") else 0 if call.op in family("zeros") else None
    value = number_of(call.get("fill_value", call.get("s"))) if value is None else value
    return None if value is None else Where(frozenset(), value, value)


# Views and copies.


def unit(d: int | None, rank: int, start: Length = 0, step: Length = 1) -> Affine:
    """``start + step * index[d]``, of ``rank`` indices; d None: ``start``."""
    return Affine(start, tuple(step if i == d else 0 for i in range(rank)))


def _term(x: Node, terms: Terms) -> Term | None:
    return terms.get(x) or where_of(x, terms)


def _at(call: Call, terms: Terms, at: list[Affine]) -> Term | None:
    """The operand at these indices, one for each of its dimensions."""
    x = call.operands[0]
    term = _term(x, terms)
    return None if term is None else substituted(term, at, shape_of(x), shape_of(call.node))


def _same(call: Call, terms: Terms) -> Term | None:
    x = call.operands[0]
    if call.node.meta["val"].dtype is torch.bool and x.meta["val"].dtype is not torch.bool and x not in terms:
        return None  # a new boolean tensor
    term = _term(x, terms)
    return None if isinstance(term, Affine) and not is_integer(call.node.meta["val"].dtype) else term


def _reshape(call: Call, terms: Terms) -> Term | None:
    """Where only dimensions of 1 come and go, the others keep their order."""
    before, after = shape_of(call.operands[0]), shape_of(call.node)
    found = kept(before, after)
    if found is None:
        return None
    new = {old: d for d, old in found.items()}
    return _at(call, terms, [unit(new.get(d), len(after)) for d in range(len(before))])


def _permute(call: Call, terms: Terms) -> Term | None:
    rank = len(shape_of(call.node))
    dims = order(call.op, call.arguments, rank)
    return _at(call, terms, [unit(dims.index(d), rank) for d in range(rank)])


def _expand(call: Call, terms: Terms) -> Term | None:
    rank, new = len(shape_of(call.operands[0])), len(shape_of(call.node))
    return _at(call, terms, [unit(d + new - rank, new) for d in range(rank)])


def _repeat(call: Call, terms: Terms) -> Term | None:
    before = shape_of(call.operands[0])
    times = [number_of(n) for n in call["repeats"]][-len(before) :] if before else []
    alike = all(same_length(n, 1) or (t is not None and equal(t, 1)) for n, t in zip(before, times, strict=True))
    return _expand(call, terms) if alike else None


def _slice(call: Call, terms: Terms) -> Term | None:
    shape = shape_of(call.operands[0])
    dim = call.dim("dim", len(shape))
    given, step = (number_of(x) for x in (call.get("start") or 0, call.get("step", 1)))
    if isinstance(given, int) and given < 0 and not isinstance(shape[dim], int):
        return None  # counted from the end, and cut at the front
    start = position(given, 0, shape[dim])
    if given is None or start is None or step is None:
        return None
    rank = len(shape)
    return _at(call, terms, [unit(d, rank, start, step) if d == dim else unit(d, rank) for d in range(rank)])


def _select(call: Call, terms: Terms) -> Term | None:
    shape = shape_of(call.operands[0])
    dim, at = call.dim("dim", len(shape)), number_of(call["index"])
    if at is None:
        return None
    at = as_length(at + shape[dim]) if isinstance(at, int) and at < 0 else at
    rank = len(shape) - 1
    return _at(call, terms, [unit(None, rank, at) if d == dim else unit(d - (d > dim), rank) for d in range(rank + 1)])


def _index(call: Call, terms: Terms) -> Term | None:
    """``x[i, j]`` with indices that are affine themselves: transformers looks up its padding mask so."""
    indices, out = call["indices"], shape_of(call.node)
    found = [affine_of(i, terms) for i in indices if isinstance(i, Node)]
    at = [i.aligned(len(out)) for i in found if i is not None]
    if not at or not len(at) == len(found) == len(indices) == len(call.shape("self")):
        return None
    return None if any(_may_wrap(i, out) for i in at) else _at(call, terms, at)


def _may_wrap(at: Affine, shape: tuple[Length, ...]) -> bool:
    """A negative index counts from the end."""
    low = minimum(at, shape)
    return not (isinstance(low, int) and low >= 0)


#: Families of operators, and how they carry terms.
FUNCTIONS: tuple[tuple[Iterable[Any], Transfer], ...] = (
    (family("arange"), _arange),
    (family("full", "ones", "zeros"), _constant),
    (family("same_values"), _same),
    (family("reshape"), _reshape),
    (family("permute"), _permute),
    (family("expand"), _expand),
    (overloads("repeat"), _repeat),
    (family("slice"), _slice),
    (overloads("select.int"), _select),
    (family("index"), _index),
)
