"""One token of a split sequence (a class token, the last one): the rank that has it hands it to all.

``select`` of a fixed position needs no gather of all tokens: every rank adds up its own rows with all but that one set
to zero, a summand (Partial) of one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, shape_of
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.types import Length, Partial, Shard, Type, as_length, same_length

__all__ = ["PickPlan", "decide_pick", "write_pick"]

aten = torch.ops.aten


@dataclass(frozen=True)
class PickPlan:
    """``Decision.detail``: the position, and whether its dimension stays, of size one."""

    source: Shard
    index: Length
    keep: bool


def decide_pick(call: Call, types: list[Type]) -> Decision | None:
    """A decision for a known position among split tokens; else None."""
    if call.op is not aten.select.int and call.op not in family("slice"):
        return None
    (type_,) = types
    if not isinstance(type_, Shard) or not type_.plain or call.operands[0].meta["val"].dtype is torch.bool:
        return None
    shape = shape_of(call.operands[0])
    if type_.dim != call.dim("dim", len(shape)):
        return None
    if call.op is aten.select.int:
        index = call["index"]
        if not isinstance(index, int):
            return None
        position = as_length(shape[type_.dim] + index) if index < 0 else index
    else:
        bounds = cut_bounds(call, shape[type_.dim], type_.dim)
        if bounds is None or not same_length(as_length(bounds[0][1] - bounds[0][0]), 1):
            return None
        position = bounds[0][0]
    plan = PickPlan(type_, position, call.op in family("slice"))
    return Decision((type_,), (Partial(origin=f"{call.op}: one rank has the token"),), detail=plan)


def write_pick(build: Builder, call: Call, x: Node, plan: PickPlan) -> Node:
    """This rank's summand: its row, or zeros."""
    value = call.operands[0].meta["val"]
    sequence, dim = plan.source.sequence, plan.source.dim
    here = build.call(aten.eq.Scalar, build.positions(sequence, value.device), build.size(plan.index))
    if sequence.has_pads(build.ranks.size) or any(sequence.whole):
        # A pad has the index of the last row, and a whole segment is on every rank: the token counts once.
        here = build.mask_pads(here, 0, sequence)
    here = build.call(aten.reshape.default, here, [-1 if d == dim else 1 for d in range(value.dim())])
    rows = build.call(aten.where.ScalarOther, here, x, 0)
    low = value.dtype in (torch.float16, torch.bfloat16)
    return build.call(aten.sum.dim_IntList, rows, [dim], plan.keep, dtype=torch.float32 if low else value.dtype)
