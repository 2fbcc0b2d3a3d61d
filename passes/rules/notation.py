"""Rules in the notation that they print: read back, and as patterns for operands of any rank.

``parse(str(rule)) == rule`` for every rule.  A pattern says more with the same words::

    [*d, i], [o, i] -> [*d, o] reduction={i} | [*d, i], [o, i], [o] -> [*d, o] whole={i}

``*d``     any number of dimensions ``d0, d1, ...``, aligned from the right: a size of 1 against a larger one has none
``1``      a dimension of size 1
``-``      an operand that lends its dtype or its sizes, no data
``...``    more of the same, any number
``|``      else: the first alternative that operands and results fit is the rule
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import aligned
from fxsp.passes.rules.rule import Dims, OpRule
from fxsp.types import Length, same_length

__all__ = ["Pattern", "parse", "written"]

Shape = tuple[Length, ...]

_KINDS = ("reduction", "combined", "whole")
_RULE = re.compile(rf"([^=]*)->([^={{}}]*?)((?:\s(?:{'|'.join(_KINDS)})=\{{[^{{}}]*\}})*)")
_TENSOR = re.compile(r"\s*(?:\[([^\[\]]*)\]|(-)|(\.\.\.))\s*(?:,|$)")


def _tensors(text: str) -> tuple[list[Dims | None], bool]:
    """The tensors of one side, and whether more of the last may follow."""
    text = text.strip()
    text = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    found: list[Dims | None] = []
    at = 0
    while at < len(text):
        match = _TENSOR.match(text, at)
        if match is None:
            raise ValueError(f"{text[at:]!r} is no list of tensors: [a, b c, 1], - or ...")
        at = match.end()
        if match[3]:
            return found, True
        dims = match[1].split(",") if match[1] and match[1].strip() else []
        found.append(None if match[2] else tuple(tuple(f for f in dim.split() if f != "1") for dim in dims))
    return found, False


@dataclass(frozen=True)
class Pattern:
    """One alternative: a rule in which ``*d`` stands for a factor, and whether its last operand, or result, repeats."""

    rule: OpRule
    operands_repeat: bool = False
    results_repeat: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is no rule: [a, b], [b] -> [a, b] whole={{b}}")
        operands, operands_repeat = _tensors(match[1])
        results, results_repeat = _tensors(match[2])
        if None in results:
            raise ValueError(f"{text!r}: a result lends nothing")
        kinds = {k: frozenset(v.replace(" ", "").split(",")) for k, v in re.findall(r"(\w+)=\{(.*?)\}", match[3])}
        rule = OpRule(tuple(operands), tuple(r for r in results if r is not None), {}, **kinds)
        return cls(rule, operands_repeat, results_repeat)

    def fit(self, operands: list[Shape], results: list[Shape]) -> OpRule | None:
        """The rule for tensors of these shapes; None if they do not fit."""
        left, right = self.rule.operands, self.rule.results
        if self.operands_repeat:
            left = (*left, *left[-1:] * (len(operands) - len(left)))
        if self.results_repeat:
            right = (*right, *right[-1:] * (len(results) - len(right)))
        if len(left) != len(operands) or len(right) != len(results):
            return None
        sizes: dict[str, Length] = {}
        ranks: dict[str, int] = {}
        made: list[Dims | None] = []
        # Results first: operands are aligned with what they have.
        for dims, shape in zip((*right, *left), (*results, *operands), strict=True):
            placed = None if dims is None else _placed(dims, shape, ranks)
            if dims is not None and placed is None:
                return None
            for factors, n in zip(placed or (), shape, strict=placed is not None):
                if factors:
                    sizes.setdefault(factors[0], n)
                elif not same_length(n, 1):
                    return None
            made.append(placed)
        for i, shape in enumerate(operands, len(right)):
            dims = made[i]
            if dims is not None:
                made[i] = tuple(f if f and aligned(n, sizes[f[0]]) else () for f, n in zip(dims, shape, strict=True))
        outs = tuple(dims for dims in made[: len(right)] if dims is not None)
        return OpRule(tuple(made[len(right) :]), outs, sizes, **{k: _each(v, ranks) for k, v in self._kinds})

    @cached_property
    def _kinds(self) -> list[tuple[str, frozenset[str]]]:
        return [(kind, factors) for kind in _KINDS if (factors := getattr(self.rule, kind))]


def _placed(dims: Dims, shape: Shape, ranks: dict[str, int]) -> Dims | None:
    """The dimensions with those that a star stands for, of which ``ranks`` says the number; None if they do not fit."""
    for at, factors in enumerate(dims):
        if factors and factors[0][0] == "*":
            star, count = factors[0], len(shape) - len(dims) + 1
            rank = ranks.setdefault(star, count)
            if not 0 <= count <= rank:
                return None
            return (*dims[:at], *[(f"{star[1:]}{i}",) for i in range(rank - count, rank)], *dims[at + 1 :])
    return dims if len(dims) == len(shape) else None


def _each(factors: frozenset[str], ranks: dict[str, int]) -> frozenset[str]:
    stars = [f for f in factors if f[0] == "*"]
    return factors.difference(stars).union(f"{s[1:]}{i}" for s in stars for i in range(ranks[s]))


def parse(text: str) -> OpRule:
    """The rule that prints as ``text``.  Raises ``ValueError`` for anything else."""
    return Pattern.parse(text).rule


def written(text: str, unless: Callable[[Call], bool] | None = None) -> Callable[[Call], OpRule | None]:
    """The rule function of a pattern, or of alternatives; calls of which ``unless`` is true have no rule."""
    patterns = [Pattern.parse(alternative) for alternative in text.split("|")]

    def rule(call: Call) -> OpRule | None:
        if unless is not None and unless(call):
            return None
        operands, results = call.operand_shapes(), call.result_shapes()
        return next((r for p in patterns if (r := p.fit(operands, results)) is not None), None)

    return rule
