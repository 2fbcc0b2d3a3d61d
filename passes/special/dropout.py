"""Active dropout of split values: every rank draws for the whole value, as one device does, and uses its own rows.

With ``rng="per_rank"`` a rank draws for its own rows only, by their positions.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.kernels.ops import local_ops
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, shape_of
from fxsp.passes.rules.rule import draws
from fxsp.passes.special.special import Local, Special
from fxsp.types import Shard, Type

__all__ = ["BY_POSITION", "Dropout"]

aten = torch.ops.aten
#: A note of the report.
BY_POSITION = "dropout of split values draws by position (rng='per_rank'): not the draw of one device"


class Dropout(Special):
    """The result is split as the operand is."""

    ops = frozenset({aten.dropout.default})

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        active = draws(call) and isinstance(types[0], Shard)
        return Decision((types[0],), (types[0],), special=self) if active else None

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        build, (type_,), like, shape = local.build, decision.results, call.node.meta["val"], shape_of(call.node)
        assert isinstance(type_, Shard)
        arguments = local.arguments(call, decision)
        x, p, train = (arguments[name] for name in ("input", "p", "train"))
        if local.program.options.rng == "per_rank":
            local.program.report.note(BY_POSITION)
            own, dim, back = build.expose(x, shape, type_)
            rows = build.positions(type_.sequence, like.device)
            return back(build.call(local_ops.dropout.default, own, build.seed(like.device), rows, dim, p))
        ones = build.call(aten.ones.default, build.sizes(shape), dtype=like.dtype, device=like.device)
        draw = build.call(call.op, ones, p, train)
        return build.call(aten.mul.Tensor, x, build.shard(draw, shape, type_))
