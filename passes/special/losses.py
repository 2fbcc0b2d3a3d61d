"""Losses over split tokens: each rank sums over its own tokens, the divisor counts all of them.

A loss with ``reduction="none"`` is elementwise over the tokens.  Its sum is a summand per rank (Partial), pads
zeroed; a mean divides by the global number of elements, and ``cross_entropy_loss`` by the global number (or the class
weights) of targets that are not ignored, which is one more sum over ranks of a single number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.counts import reduced_bytes
from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.families import family
from fxsp.types import Partial, Shard, Type, Used, product, same_length

__all__ = ["LossPlan", "decide_loss", "write_loss"]

aten = torch.ops.aten
_NONE, _MEAN = 0, 1


@dataclass(frozen=True)
class LossPlan:
    """``Decision.detail`` of a loss: which operand type the unreduced loss has."""

    unreduced: Shard


def decide_loss(call: Call, types: list[Type]) -> Decision | None:
    """A decision where the tokens of a loss are split and it can be summed rank by rank; else None."""
    if call.op not in family("elementwise_loss", "class_loss") or not isinstance(types[0], Shard):
        return None
    if call.op in family("class_loss"):
        return _class_loss(call, types[0], types)
    shape = call.operand_shapes()[0]
    if any(len(s) != len(shape) for s in call.operand_shapes()[1:]):
        return None
    if any(not same_length(a, b) for s in call.operand_shapes()[1:] for a, b in zip(s, shape, strict=True)):
        return None
    return _decision(call, types[0], tuple(types[0] for _ in types), types[0])


def _decision(call: Call, source: Shard, operands: tuple[Type, ...], unreduced: Shard) -> Decision:
    result: Type = unreduced if call["reduction"] == _NONE else Partial(origin=f"{call.op} over split tokens")
    return Decision(operands, (result,), detail=LossPlan(unreduced))


def _class_loss(call: Call, source: Shard, types: list[Type]) -> Decision | None:
    """Scores ``[N, C, ...]`` and targets ``[N, ...]``, split along anything but the classes."""
    scores, target = call.operand_shapes()[:2]
    if len(scores) < 2 or len(target) != len(scores) - 1 or source.dim == 1:
        return None
    if call.operands[1].meta["val"].dtype.is_floating_point:
        return None
    dim = source.dim if source.dim == 0 else source.dim - 1
    rows = Shard(dim, source.sequence, source.outer, origin=source.origin)
    operands: list[Type] = [source, rows, *(Used() for _ in types[2:])]
    return _decision(call, source, tuple(operands), rows)


def write_loss(build: Builder, call: Call, arguments: dict[str, Any], plan: LossPlan, mask: Any) -> Node:
    """The local loss: unreduced, or this rank's summand.  ``mask(x, shape, type)`` zeroes pads."""
    none = {**arguments, "reduction": _NONE}
    args, kwargs = call.bound_to(none).rebuild(reduction=_NONE)
    losses = build.call(call.op, *args, **kwargs)
    if call["reduction"] == _NONE:
        return losses
    shape = call.operand_shapes()[0] if call.op in family("elementwise_loss") else call.operand_shapes()[1]
    wide = torch.promote_types(call.node.meta["val"].dtype, torch.float32)
    total = build.call(aten.sum.default, mask(losses, shape, plan.unreduced), dtype=wide)
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
    count = build.all_reduce(build.call(aten.sum.default, mask(weights, shape, plan.unreduced), dtype=wide))
    sent = reduced_bytes(1, wide, build.ranks.size)
    build.record("all_reduce", count, sent, "targets that are not ignored")
    return build.call(aten.div.Tensor, total, count)
