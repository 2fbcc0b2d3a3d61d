"""Sums and means over split tokens: each rank's summand, in fp32 at least, divided by the global count."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, shape_of
from fxsp.passes.rules.decide import decide_by_rule
from fxsp.passes.rules.families import family
from fxsp.passes.rules.reduce import reduced_dims
from fxsp.passes.special.special import Local, Special
from fxsp.types import Partial, Type, product

__all__ = ["Sums"]

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
