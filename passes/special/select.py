"""One token of a split sequence (a class token, the last one): the rank that has it hands it to all.

``select`` of a fixed position needs no gather of all tokens: every rank adds up its own rows with all but that one set
to zero, a summand (Partial) of one row.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, facts, shape_of
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Partial, Shard, Type, as_length, same_length

__all__ = ["Select"]

aten = torch.ops.aten


class Select(Special):
    """A known position among split tokens that are not free: this rank's summand is its row, or zeros."""

    ops = family("slice") | {aten.select.int}

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        (x,), (type_,) = call.operands, types
        plain = isinstance(type_, Shard) and type_.plain
        if not isinstance(type_, Shard) or not plain or facts(x).free or x.meta["val"].dtype is torch.bool:
            return None
        shape = shape_of(x)
        dim = call.dim("dim", len(shape))
        bounds = cut_bounds(call, shape[dim], dim) if type_.dim == dim else None
        if bounds is None or not same_length(as_length(bounds[0][1] - bounds[0][0]), 1):
            return None
        result = Partial(origin=f"{call.op}: one rank has the token")
        return Decision((type_,), (result,), detail=bounds[0][0], special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        build, (source,), value = local.build, decision.operands, call.operands[0].meta["val"]
        assert isinstance(source, Shard)
        sequence, dim = source.sequence, source.dim
        x = local.arguments(call, decision)["self"]
        here = build.call(aten.eq.Scalar, build.positions(sequence, value.device), build.size(decision.detail))
        if sequence.has_pads(build.ranks.size) or any(sequence.whole):
            # A pad has the index of the last row, and a whole segment is on every rank: the token counts once.
            here = build.mask_pads(here, 0, sequence)
        here = build.call(aten.reshape.default, here, [-1 if d == dim else 1 for d in range(value.dim())])
        rows = build.call(aten.where.ScalarOther, here, x, 0)
        keep = call.op in family("slice")
        return build.call(aten.sum.dim_IntList, rows, [dim], keep, dtype=summand_dtype(value.dtype))
