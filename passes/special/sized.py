"""Views and expansions of split values that are given sizes: those of a rank's part."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, Decision, shape_of
from fxsp.passes.rules.decide import decide_by_rule
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Replicate, Shard, Type, shape_on_rank

__all__ = ["Sized", "local_sizes"]

aten = torch.ops.aten


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


def local_sizes(build: Builder, node: Node, type_: Type) -> list[int | Node]:
    """The sizes of a value of this type on one rank."""
    return build.sizes(shape_on_rank(shape_of(node), type_, build.ranks.size))
