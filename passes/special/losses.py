"""Losses over split tokens: each rank sums over its own tokens, the divisor counts all of them.

A loss with ``reduction="none"`` is elementwise over the tokens.  Its sum is a summand per rank (Partial), pads
zeroed; a mean divides by the global number of elements, and ``cross_entropy_loss`` by the global number (or the class
weights) of targets that are not ignored, which is one more sum over ranks of a single number.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.kernels.counts import reduced_bytes
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Partial, Shard, Type, Used, product, same_length

__all__ = ["Losses"]

aten = torch.ops.aten
_NONE, _MEAN = 0, 1


class Losses(Special):
    """Their unreduced value is split, their sum or mean a summand; ``Decision.detail`` is the type of the former."""

    ops = family("elementwise_loss", "class_loss")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        if not isinstance(types[0], Shard):
            return None
        operands = _class_loss(call, types[0], types) if call.op in family("class_loss") else _elementwise(call, types)
        if operands is None:
            return None
        unreduced = operands[1 if call.op in family("class_loss") else 0]
        none = call["reduction"] == _NONE
        result: Type = unreduced if none else Partial(origin=f"{call.op} over split tokens")
        return Decision(operands, (result,), detail=unreduced, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        build, unreduced, arguments = local.build, decision.detail, local.arguments(call, decision)
        losses = build.same(call, arguments, reduction=_NONE)
        if call["reduction"] == _NONE:
            return losses
        shape = call.operand_shapes()[1 if call.op in family("class_loss") else 0]
        wide = torch.promote_types(call.node.meta["val"].dtype, torch.float32)
        total = build.call(aten.sum.default, build.masked(losses, shape, unreduced), dtype=wide)
        if call["reduction"] != _MEAN:
            return total
        if call.op in family("elementwise_loss"):
            return build.call(aten.div.Tensor, total, build.size(product(shape)))
        counted = build.call(aten.ne.Scalar, arguments["target"], call["ignore_index"])
        weights = build.call(aten.to.dtype, counted, wide)
        if isinstance(arguments.get("weight"), Node):
            classes = build.call(aten.where.ScalarOther, counted, arguments["target"], 0)
            flat = build.call(aten.flatten.using_ints, classes, 0, -1)
            chosen = build.call(aten.index_select.default, arguments["weight"], 0, flat)
            chosen = build.call(aten.view_as.default, chosen, counted)
            weights = build.call(aten.mul.Tensor, weights, chosen)
        count = build.all_reduce(build.call(aten.sum.default, build.masked(weights, shape, unreduced), dtype=wide))
        sent = reduced_bytes(1, wide, build.ranks.size)
        build.record("all_reduce", count, sent, "targets that are not ignored")
        return build.call(aten.div.Tensor, total, count)


def _elementwise(call: Call, types: list[Type]) -> tuple[Type, ...] | None:
    """All operands split alike, where they have the same shape."""
    shape, *others = call.operand_shapes()
    alike = all(len(s) == len(shape) and all(map(same_length, s, shape)) for s in others)
    return tuple(types[0] for _ in types) if alike else None


def _class_loss(call: Call, source: Shard, types: list[Type]) -> tuple[Type, ...] | None:
    """Scores ``[N, C, ...]`` and targets ``[N, ...]``, split along anything but the classes."""
    scores, target = call.operand_shapes()[:2]
    if len(scores) < 2 or len(target) != len(scores) - 1 or source.dim == 1:
        return None
    if call.operands[1].meta["val"].dtype.is_floating_point:
        return None
    dim = source.dim if source.dim == 0 else source.dim - 1
    rows = Shard(dim, source.sequence, source.outer, origin=source.origin)
    return (source, rows, *(Used() for _ in types[2:]))
