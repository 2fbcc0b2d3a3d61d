"""What is known of a small tensor without looking at its data: its elements as terms of their own indices.

A mask is often computed from nothing but positions: ``arange(S)[None, :] <= arange(S)[:, None]``.  A *term* says what
such a tensor holds::

    Affine(1, (0, 0, 1, 0))         at index [b, h, i, j] the number i + 1
    Where({Affine >= 0, ...}, x, y) x where all conditions hold, else y

A condition is an affine term that must not be negative, or a boolean tensor that is not known further (:class:`Leaf`).
Terms are facts, proven by the arithmetic here; a tensor without a term is any tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch.fx import Node

from fxsp.types import Length, as_length, same_length

__all__ = ["Affine", "Leaf", "Term", "Where", "combine", "equal", "minimum", "simplified", "substituted"]


@dataclass(frozen=True)
class Affine:
    """The integer ``const + sum(coeffs[d] * index[d])``; as a condition: that it is at least 0."""

    const: Length
    coeffs: tuple[Length, ...]

    def __add__(self, other: Affine) -> Affine:
        """Both are aligned at their last dimension."""
        a, b = self.aligned(len(other.coeffs)), other.aligned(len(self.coeffs))
        coeffs = tuple(as_length(x + y) for x, y in zip(a.coeffs, b.coeffs, strict=True))
        return Affine(as_length(a.const + b.const), coeffs)

    def __mul__(self, factor: Length) -> Affine:
        return Affine(as_length(self.const * factor), tuple(as_length(c * factor) for c in self.coeffs))

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine) -> Affine:
        return self + -other

    def negated(self) -> Affine:
        """The condition that holds where this one does not."""
        return -self + Affine(-1, ())

    def aligned(self, rank: int) -> Affine:
        return Affine(self.const, (0,) * (rank - len(self.coeffs)) + self.coeffs)


@dataclass(frozen=True)
class Leaf:
    """A boolean tensor; ``dims[d]`` is its dimension that runs along dimension ``d``, None if it is the same there."""

    node: Node
    dims: tuple[int | None, ...]
    inverted: bool = False

    def negated(self) -> Leaf:
        return replace(self, inverted=not self.inverted)

    def aligned(self, rank: int) -> Leaf:
        return replace(self, dims=(None,) * (rank - len(self.dims)) + self.dims)


@dataclass(frozen=True)
class Where:
    """``yes`` where all conditions hold (everywhere, if there is none), else ``no``; both are numbers."""

    conditions: frozenset[Affine | Leaf]
    yes: Any
    no: Any

    def flipped(self) -> Where | None:
        """The same term with its condition negated, if it has exactly one."""
        if len(self.conditions) != 1:
            return None
        (only,) = self.conditions
        return Where(frozenset([only.negated()]), self.no, self.yes)

    def aligned(self, rank: int) -> Where:
        return Where(frozenset(c.aligned(rank) for c in self.conditions), self.yes, self.no)


Term = Affine | Where


def equal(a: Any, b: Any) -> bool:
    """Whether two numbers certainly are equal; a NaN equals nothing."""
    if isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr):
        return same_length(as_length(a), as_length(b))
    return bool(a == b)


def minimum(term: Affine, shape: tuple[Length, ...]) -> Length | None:
    """The smallest value over all indices of a tensor of this shape; None if it depends on lengths that are symbols."""
    low = term.const
    for coeff, size in zip(term.coeffs, shape, strict=True):
        if not isinstance(coeff, int):
            return None
        if coeff < 0:
            low = as_length(low + coeff * (size - 1))
    return low


def simplified(term: Term, shape: tuple[Length, ...]) -> Term:
    """A dimension of size 1 has index 0 only; a condition that always holds is none."""
    ones = [same_length(n, 1) for n in shape]
    if isinstance(term, Affine):
        return Affine(term.const, tuple(0 if one else c for c, one in zip(term.coeffs, ones, strict=True)))
    kept: set[Affine | Leaf] = set()
    for condition in term.aligned(len(shape)).conditions:
        if isinstance(condition, Leaf):
            dims = tuple(None if one else d for d, one in zip(condition.dims, ones, strict=True))
            kept.add(replace(condition, dims=dims))
            continue
        affine = simplified(condition, shape)
        assert isinstance(affine, Affine)
        low = minimum(affine, shape)
        if isinstance(low, int) and low >= 0:
            continue
        high = minimum(-affine, shape)
        if isinstance(high, int) and high > 0:
            return Where(frozenset(), term.no, term.no)
        kept.add(affine)
    if any(c.negated() in kept for c in kept):
        return Where(frozenset(), term.no, term.no)
    return Where(frozenset(kept), term.yes, term.no)


def substituted(term: Term, at: list[Affine], shape: tuple[Length, ...], out: tuple[Length, ...]) -> Term | None:
    """The term of a view or a look-up, of shape ``out``: what ``term``, of ``shape``, is at the indices ``at``.

    These are affine in the result's own.  None where a condition would be another tensor, a part of it say.
    """
    if isinstance(term, Affine):
        result = Affine(term.const, (0,) * len(out))
        for coeff, index in zip(term.coeffs, at, strict=True):
            result += index * coeff
        return result
    conditions: set[Any] = {
        _seen(c, at, shape, out) if isinstance(c, Leaf) else substituted(c, at, shape, out) for c in term.conditions
    }
    return None if None in conditions else Where(frozenset(conditions), term.yes, term.no)


def _seen(leaf: Leaf, at: list[Affine], shape: tuple[Length, ...], out: tuple[Length, ...]) -> Leaf | None:
    """Its dimensions in another order, and among others, but none in part, repeated, or turned."""
    dims: list[int | None] = [None] * len(out)
    for dim, index, size in zip(leaf.dims, at, shape, strict=True):
        if dim is None:
            continue
        along = [i for i, c in enumerate(index.coeffs) if not equal(c, 0)]
        identity = len(along) == 1 and equal(index.coeffs[along[0]], 1) and equal(index.const, 0)
        if not identity or not same_length(out[along[0]], size) or dims[along[0]] is not None:
            return None
        dims[along[0]] = dim
    return replace(leaf, dims=tuple(dims))


def combine(function: Callable[..., Any], terms: list[Where]) -> Where | None:
    """``function`` of several terms, element by element, if the result has two values and they can be told apart.

    Two masks joined by ``and`` hold where all conditions of both do; by ``or`` their negations do.
    """
    for chosen in itertools.product(*([t, t.flipped()] for t in terms)):
        known = [t for t in chosen if t is not None]
        if len(known) == len(terms) and (found := _combine(known, function)) is not None:
            return found
    return None


def _combine(terms: list[Where], function: Callable[..., Any]) -> Where | None:
    # Terms under the same conditions are decided together; a term without conditions is always `yes`.
    cases = list(dict.fromkeys(t.conditions for t in terms if t.conditions))
    results = []
    for holds in itertools.product((True, False), repeat=len(cases)):
        state = dict(zip(cases, holds, strict=True)) | {frozenset(): True}
        results.append(function(*(t.yes if state[t.conditions] else t.no for t in terms)))
    yes, others = results[0], results[1:]
    if yes != yes or not all(equal(x, others[0]) for x in others):
        return None
    return Where(frozenset().union(*cases), yes, others[0] if others else yes)
