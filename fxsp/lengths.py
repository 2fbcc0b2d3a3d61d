"""Lengths: an ``int``, or the sympy expression behind a symbolic size, always global, counted in tokens.

They are computed with, compared without adding a guard, and read back from the text that torch prints.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any

import sympy
import torch

__all__ = [
    "Length",
    "as_length",
    "ceil_div",
    "equal_lengths",
    "hint",
    "parse_length",
    "product",
    "quotient",
    "same_length",
    "sizes_at_hand",
]

Length = int | sympy.Expr

#: Symbols, and quotients without a rest, and what they are equal to.
_equal: ContextVar[tuple[dict[sympy.Expr, sympy.Expr], dict[sympy.Expr, sympy.Expr]]] = ContextVar(
    "equal lengths", default=({}, {})
)


#: What symbols are for the inputs at hand.
_sizes: ContextVar[Mapping[Any, int]] = ContextVar("sizes at hand", default=MappingProxyType({}))
#: So many tokens count where nothing is known.
_TYPICAL = 1024


@contextmanager
def sizes_at_hand(sizes: Mapping[Any, int]) -> Iterator[None]:
    """Inside, :func:`hint` reads symbols as these numbers."""
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def hint(size: Any, sizes: Mapping[Any, int] | None = None) -> int:
    """A length, or a ``SymInt``, as a number: to compare costs, and to tell them; it adds no guard.

    Symbols are what ``sizes`` says, or :func:`sizes_at_hand`.  One of which nothing is known (how many places of a mask
    are true) counts as a typical 1024.
    """
    if type(size) is int:
        return size
    if isinstance(size, torch.SymInt) and size.node.hint is not None:
        return int(size.node.hint)
    length = as_length(size)
    if isinstance(length, int):
        return length
    value = sympy.sympify(length.xreplace(_sizes.get() if sizes is None else sizes))
    return int(value.subs(dict.fromkeys(value.free_symbols, _TYPICAL)))


@contextmanager
def equal_lengths(differences: Iterable[sympy.Expr]) -> Iterator[None]:
    """Inside, lengths that differ by one of these expressions count as equal: each is known to be zero.

    Two inputs may have lengths of their own, which the program requires to be equal by adding them, say; or a length
    may be known to divide, ``n - 4 * (n // 4)``.
    """
    from torch.utils._sympy.functions import FloorDiv

    differences = list(differences)
    known: dict[sympy.Expr, sympy.Expr] = {}
    quotients: dict[sympy.Expr, sympy.Expr] = {}
    for difference in sorted(differences, key=sympy.count_ops):  # a quotient before those that divide by it
        for quotient in difference.atoms(FloorDiv):
            exact = sympy.cancel(quotient.args[0] / _exactly(quotient.args[1], quotients))
            if _exactly(difference, {**quotients, quotient: exact}) == 0:
                quotients[quotient] = exact
    for difference in differences:
        rest = sympy.expand(_without(difference, quotients).xreplace(known))
        for symbol in sorted(rest.free_symbols, key=str):
            factor = rest.coeff(symbol)
            others = rest - factor * symbol
            if factor in (1, -1) and symbol not in others.free_symbols:
                solved = sympy.expand(-others / factor)
                known = {key: sympy.expand(value.xreplace({symbol: solved})) for key, value in known.items()}
                known[symbol] = solved
                break
    token = _equal.set((known, quotients))
    try:
        yield
    finally:
        _equal.reset(token)


def as_length(size: Any) -> Length:
    """The length of a dimension: an ``int``, or the sympy expression behind a ``SymInt``."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    if not isinstance(size, sympy.Expr):
        return int(size)
    known, quotients = _equal.get()
    size = _without(size, quotients)
    if known and not known.keys().isdisjoint(size.free_symbols):
        size = sympy.expand(size.xreplace(known))
    if not size.is_Atom:
        size = _divided(size)
    return int(size) if size.is_Integer else size


@lru_cache(maxsize=4096)
def _divided(size: sympy.Expr) -> sympy.Expr:
    """``size`` without floor divisions that certainly have no rest: ``(s0 * s1) // s1`` is ``s0``."""
    from torch.utils._sympy.functions import FloorDiv

    for quotient in sorted(size.atoms(FloorDiv), key=sympy.count_ops):
        exact = sympy.cancel(quotient.args[0] / quotient.args[1])
        if exact.is_polynomial() and exact.as_numer_denom()[1] == 1:
            size = size.xreplace({quotient: exact})
    return size


def _without(size: sympy.Expr, quotients: dict[sympy.Expr, sympy.Expr]) -> sympy.Expr:
    """``size`` without the quotients that are exact, where it is in whole numbers then, as lengths are computed."""
    if not any(size.has(quotient) for quotient in quotients):
        return size
    exact = _exactly(size, quotients)
    fractions = any(p.exp.is_negative for p in exact.atoms(sympy.Pow))
    return size if fractions or not all(n.is_Integer for n in exact.atoms(sympy.Number)) else exact


def _exactly(size: sympy.Expr, quotients: dict[sympy.Expr, sympy.Expr]) -> sympy.Expr:
    """``size`` with exact quotients as fractions; inside of another function they stay, which wants whole numbers."""
    others = [f for f in size.atoms(sympy.Function) if f not in quotients and any(map(f.has, quotients))]
    kept = {f: sympy.Dummy(integer=True, positive=True) for f in others}
    expanded = sympy.expand(size.xreplace({**quotients, **kept}))
    exact: sympy.Expr = expanded.xreplace({dummy: f for f, dummy in kept.items()})
    return exact


def same_length(a: Length, b: Length) -> bool:
    """Whether two lengths are certainly equal (structurally; never adds a guard)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or sympy.expand(a - b) == 0


def ceil_div(length: Length, size: int) -> Length:
    """``ceil(length / size)``, the local length of a segment split over ``size`` ranks."""
    if isinstance(length, int):
        return -(-length // size)
    from torch.utils._sympy.functions import FloorDiv

    return as_length(FloorDiv(length + size - 1, size))


def quotient(a: Length, b: Length) -> Length | None:
    """``a / b`` where ``b`` certainly divides ``a``; else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = ratio.as_numer_denom()
    return as_length(numerator) if denominator == 1 else None


def product(lengths: Any) -> Length:
    """The product of lengths (1 for none)."""
    return as_length(prod(lengths))


def parse_length(text: str) -> Length:
    """The length that this text is.  Raises ``ValueError`` for anything else."""
    try:
        return as_length(_evaluate(ast.parse(text.strip(), mode="eval").body))
    except SyntaxError as error:
        raise ValueError(f"not a length: {text!r}") from error


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _evaluate(node: ast.expr) -> Any:
    """The expression that torch prints: names are sizes, ``//`` is torch's own floor division."""
    from torch.utils._sympy.functions import CeilDiv, FloorDiv, Mod

    functions: dict[str, Any] = {
        "CeilDiv": CeilDiv,
        "FloorDiv": FloorDiv,
        "Mod": Mod,
        "Max": sympy.Max,
        "Min": sympy.Min,
    }
    match node:
        case ast.Constant(value=int(value)):
            return sympy.Integer(value)
        case ast.Name(id=name):
            return sympy.Symbol(name, positive=True, integer=True)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return FloorDiv(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.Call(func=ast.Name(id=name), args=args) if name in functions:
            return functions[name](*map(_evaluate, args))
    raise ValueError(f"not a length: {ast.unparse(node)}")
