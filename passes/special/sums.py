"""Calls whose local form counts other tokens than its operands have: sums, views that are given sizes, summands.

A sum or mean over split tokens is each rank's summand, in fp32 at least, divided by the global count.  Sizes of views
and expansions are those of a rank's part.  Which calls summands pass through is said by
:mod:`fxsp.passes.rules.summands`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, Decision, shape_of, type_of
from fxsp.passes.rules.decide import decide_by_rule
from fxsp.passes.rules.families import family
from fxsp.passes.rules.reduce import reduced_dims
from fxsp.passes.rules.summands import decide_summands
from fxsp.passes.special.special import Local, Special
from fxsp.types import Partial, Replicate, Shard, Type, product, shape_on_rank

__all__ = ["Sized", "Summands", "Sums", "local_sizes"]

aten = torch.ops.aten


class Sums(Special):
    """The rule decides; a mean counts all tokens, not those of a rank."""

    ops = family("total")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        decision = decide_by_rule(call, types)
        return replace(decision, special=self) if isinstance(decision.results[0], Partial) else decision

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        build, shape = local.build, shape_of(call.operands[0])
        x = local.arguments(call, decision)["self"]
        dims, wide = reduced_dims(call, len(shape)), summand_dtype(call.node.meta["val"].dtype)
        new = build.call(aten.sum.dim_IntList, x, dims, bool(call.get("keepdim", False)), dtype=wide)
        if call.op in family("mean"):
            count = product(shape[d] for d in dims)
            new = build.call(aten.div.Tensor, new, build.size(count))
        return new


class Sized(Special):
    """The rule decides; sizes are derived from the result's type."""

    ops = family("expand", "reshape")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        decision = decide_by_rule(call, types)
        if all(isinstance(t, Replicate) for t in (*decision.operands, *decision.results)):
            return decision
        # Always where a second operand (of expand_as, view_as) lends a shape, because that may be local.
        lent = len(call.operands) > 1
        sized = call.op in family("expand") or lent or isinstance(decision.results[0], Shard)
        return replace(decision, special=self) if sized else decision

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        op = aten.expand.default if call.op in family("expand") else aten.reshape.default
        x, *_ = local.arguments(call, decision).values()
        return local.build.call(op, x, local_sizes(local.build, call.node, decision.results[0]))


class Summands(Special):
    """Each rank's summand of the result; sums of them are wide, as those of tokens are."""

    ops = family("joins", "linear", "scale") | {aten.div.Tensor}

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        decision = decide_summands(call, [type_of(x) for x in call.operands])
        if decision is None:
            return None
        special = Sums() if call.op in family("total") else Sized() if call.op in family("expand") else self
        return replace(decision, special=special)


def local_sizes(build: Builder, node: Node, type_: Type) -> list[int | Node]:
    """The sizes of a value of this type on one rank."""
    return build.sizes(shape_on_rank(shape_of(node), type_, build.ranks.size))
