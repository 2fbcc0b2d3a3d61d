"""How operators carry terms (:mod:`fxsp.passes.masks.terms`) from operands to result: arithmetic and comparisons."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxsp.passes.graph import Call, shape_of
from fxsp.passes.masks.terms import Affine, Term, Where, combine, equal
from fxsp.passes.masks.values import Terms, Transfer, affine_of, number_of, unit, where_of
from fxsp.passes.rules.families import family, names_of, overloads
from fxsp.types import same_length

__all__ = ["FUNCTIONS"]

#: Of affine terms, too.
_SUMS: dict[str, Callable[..., Affine]] = {"add": operator.add, "sub": operator.sub, "rsub": lambda a, b: b - a}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **_SUMS, "mul": operator.mul,
    "logical_and": lambda a, b: bool(a) and bool(b), "logical_or": lambda a, b: bool(a) or bool(b),
    "logical_xor": lambda a, b: bool(a) != bool(b), "bitwise_and": operator.and_, "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor, "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "maximum": max, "minimum": min,
}  # fmt: skip
#: Whether ``a OP b`` holds, as affine terms that must not be negative; of ``ne``, those of its contrary.
_COMPARISONS: dict[str, Callable[[Affine, Affine], list[Affine]]] = {
    "ge": lambda a, b: [a - b],
    "gt": lambda a, b: [(b - a).negated()],
    "le": lambda a, b: [b - a],
    "lt": lambda a, b: [(a - b).negated()],
    "eq": lambda a, b: [a - b, b - a],
    "ne": lambda a, b: [a - b, b - a],
}


def _binary(call: Call, terms: Terms) -> Term | None:
    name = call.op._opname
    a, b, *_ = call.arguments.values()
    alpha = call.get("alpha", 1)
    if alpha != 1 or call.get("rounding_mode") is not None:
        return None
    left, right = affine_of(a, terms), affine_of(b, terms)
    if left is not None and right is not None:
        if name in _COMPARISONS:
            return Where(frozenset(_COMPARISONS[name](left, right)), name != "ne", name == "ne")
        if name in _SUMS:
            return _SUMS[name](left, right)
        for x, factor in ((left, right), (right, left)):
            if name == "mul" and all(equal(c, 0) for c in factor.coeffs):
                return x.aligned(len(factor.coeffs)) * factor.const
    values = _aligned(call, terms, a, b)
    if not values or not all(_plain(v) for t in values for v in (t.yes, t.no)):
        return None
    if name in names_of("bitwise") and any(isinstance(v, float) for t in values for v in (t.yes, t.no)):
        return None
    return combine(_ARITHMETIC[name], values)


def _aligned(call: Call, terms: Terms, *arguments: Any) -> list[Where]:
    """The terms of arguments, with the dimensions of the result; none if one is not known."""
    found = [where_of(x, terms) for x in arguments]
    return [t.aligned(len(shape_of(call.node))) for t in found if t is not None] if None not in found else []


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _unary(call: Call, terms: Terms) -> Term | None:
    x = call.operands[0]
    if call.op._opname == "neg":
        term = terms.get(x)
        if isinstance(term, Affine):
            return -term
        return combine(operator.neg, [term]) if term is not None and _plain(term.yes) and _plain(term.no) else None
    if call.op._opname == "bitwise_not" and x.meta["val"].dtype is not torch.bool:
        return None
    term = where_of(x, terms)
    return None if term is None else combine(operator.not_, [term])


def _choose(call: Call, terms: Terms) -> Term | None:
    """``where`` and ``masked_fill``."""
    names = ("condition", "self", "other") if "condition" in call.arguments else ("mask", "value", "self")
    chosen = _aligned(call, terms, *(call[name] for name in names))
    return combine(lambda c, a, b: a if c else b, chosen) if chosen else None


def _triangle(call: Call, terms: Terms) -> Term | None:
    """Kept where ``row + diagonal - column`` is at least 0 (``tril``), or at most 0 (``triu``); 0 elsewhere."""
    term, diagonal = where_of(call["self"], terms), number_of(call["diagonal"])
    if term is None or diagonal is None:
        return None
    rank = len(shape_of(call.node))
    below = Affine(diagonal, (0,) * (rank - 2) + (1, -1))
    inside = Where(frozenset([below if call.op._opname == "tril" else -below]), True, False)
    return combine(lambda c, x: x if c else type(x)(0), [inside, term])


def _cumsum(call: Call, terms: Terms) -> Term | None:
    term = terms.get(call.operands[0])
    rank = len(shape_of(call.node))
    if not isinstance(term, Where) or term.conditions or not isinstance(term.yes, (bool, int)) or not rank:
        return None
    dim, value = call.dim("dim", rank), int(term.yes)
    return unit(dim, rank, value, value)


def _diff(call: Call, terms: Terms) -> Term | None:
    """Of consecutive positions: the step everywhere, also at the front where what is put before continues them."""
    x, before = affine_of(call["self"], terms), affine_of(call.get("prepend"), terms)
    if x is None or before is None or call.get("n", 1) != 1 or call.get("append") is not None:
        return None
    dim = call.dim("dim", len(shape_of(call.node)))
    if not same_length(shape_of(call["prepend"])[dim], 1):
        return None
    step = x.coeffs[dim]
    first = x - before
    steady = all(equal(c, 0) for d, c in enumerate(first.coeffs) if d != dim) and equal(first.const, step)
    return Affine(step, (0,) * len(x.coeffs)) if steady else None


#: Families of operators, and how they carry terms.
FUNCTIONS: tuple[tuple[Iterable[Any], Transfer], ...] = (
    (overloads(*(f"{name}.{o}" for name in _ARITHMETIC for o in ("Tensor", "Scalar", "default"))), _binary),
    (family("negation"), _unary),
    (overloads("where.*", "masked_fill.*"), _choose),
    (family("triangle"), _triangle),
    (overloads("cumsum"), _cumsum),
    (overloads("diff"), _diff),
)
