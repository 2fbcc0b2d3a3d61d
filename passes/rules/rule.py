"""Sharding rules: how the dimensions of an operator's operands and results decompose into factors.

A rule is data.  ``linear`` on ``[b, s, i]`` prints as ``([b, s, i], [o, i]) -> ([b, s, o]) reduction={i}``: a factor
shared by an operand and a result passes a shard through; sharding a *reduction* factor gives a summand (Partial); a
*whole* factor must not be sharded.  A dimension may be a product of factors: ``flatten`` of ``[b, s, c]`` is ``([b, s,
c]) -> ([b s, c])``.  After Shardy's ``OpShardingRule``; the same rule serves typing, reports and costs.

Rules are built per node, because operators are polymorphic in rank: a *rule function* takes :class:`Call` and returns
an :class:`OpRule`, or None when this use of the operator has no rule (then all operands are made whole).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fxsp.passes.graph import Call
from fxsp.types import Length

__all__ = ["Dims", "Factors", "OpRule", "RuleFunction", "draws", "passing", "rows"]

#: Factors of one dimension, outermost first.
Factors = tuple[str, ...]
#: The dimensions of one tensor.
Dims = tuple[Factors, ...]


@dataclass(frozen=True)
class OpRule:
    """Factors of every tensor operand (in schema order) and result; see the module's docstring for the notation.

    An operand None lends no data, only its dtype or sizes (``type_as``): any type will do.
    """

    operands: tuple[Dims | None, ...]
    results: tuple[Dims, ...]
    #: Of factors that share a dimension, and of those of products.
    sizes: dict[str, Length] = field(default_factory=dict, hash=False, compare=False)
    reduction: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    #: Reduced, by something else than a sum (a maximum): the ranks' results are combined; see
    #: fxsp.passes.special.extremes.
    combined: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        known = {f for dims in (*self.operands, *self.results) for dim in dims or () for f in dim}
        stray = (self.reduction | self.whole | self.combined) - known
        if stray:
            raise ValueError(f"factors {sorted(stray)} are in no dimension of {self}")
        results = {f for dims in self.results for dim in dims for f in dim}
        reduced = (self.reduction | self.combined) & results
        if reduced:
            raise ValueError(f"reduction factors {sorted(reduced)} appear in a result of {self}")

    def __str__(self) -> str:
        def side(tensors: tuple[Dims | None, ...]) -> str:
            texts = ["-" if t is None else "[" + ", ".join(" ".join(d) or "1" for d in t) + "]" for t in tensors]
            return f"({', '.join(texts)})"

        text = f"{side(self.operands)} -> {side(self.results)}"
        for kind in ("reduction", "combined", "whole"):
            factors = getattr(self, kind)
            if factors:
                text += f" {kind}={{{', '.join(sorted(factors))}}}"
        return text


RuleFunction = Callable[[Call], "OpRule | None"]


def draws(call: Call) -> bool:
    """Whether this call draws random numbers: dropout does not at p = 0, nor outside training (None is training)."""
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return False
    if "dropout_p" in call.arguments:  # attention
        return bool(call["dropout_p"])
    return not ("p" in call.arguments and "train" in call.arguments) or bool(call["train"] is not False and call["p"])


def rows(count: int, prefix: str = "d", but: Mapping[int, str] | None = None) -> Dims:
    """``count`` dimensions, each one factor: ``d0``, ``d1``, ...; those of ``but`` have other names."""
    return tuple(((but or {}).get(i, f"{prefix}{i}"),) for i in range(count))


def passing(call: Call, changed: Iterable[int]) -> OpRule:
    """One operand, and results of its rank: dimensions ``d1`` that are ``changed`` are whole, the others pass."""
    rank, new = len(call.operand_shapes()[0]), {i: f"w{i}" for i in changed}
    results = tuple(rows(rank, but=new) for _ in call.result_shapes())
    return OpRule((rows(rank),), results, whole=frozenset(f"{x}{i}" for i in new for x in "dw"))
