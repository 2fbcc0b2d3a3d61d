"""Operators that read a tensor's shape and not its data: ``zeros_like``, ``randn_like``, ``new_zeros`` and their kind.

The tensor is neither gathered nor summed for them; what they make has its sizes from its type::

    zeros_like, ones_like, full_like, empty_like    split as the operand is, and whole without communication
    randn_like, rand_like, uniform_, ...            every rank draws the whole value, as one device does, and those
                                                    that meet shards use their own rows of it
    new_zeros, new_full, ...                        as their sizes say

They have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.builder import Builder, memory_order
from fxsp.passes.graph import Call, Decision, shape_of, type_of
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Replicate, Shard, Type, shape_on_rank

__all__ = ["Likes", "is_constant", "write_like"]

aten = torch.ops.aten


class Likes(Special):
    """They ask nothing of their operand."""

    ops = family("constant", "drawn", "factory")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        if call.node.meta["val"].layout != torch.strided:
            return None
        result: Type = Replicate(origin=f"{call.op} reads a shape only")
        given = tuple(type_of(x) for x in call.operands)  # a summand, say, stays one
        if call.op in family("constant") and isinstance(given[0], Shard):
            result = given[0]
        return Decision(given, (result,), special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        split = any(isinstance(t, Shard) for t in decision.operands)
        if call.op in family("drawn") and split and local.program.options.rng == "per_rank":
            local.program.report.note(
                f"{call.op} of split values draws for the whole value on every rank, with rng='per_rank' too"
            )
        return write_like(local.build, call.node, decision.results[0], local.copies)


def is_constant(node: Node) -> bool:
    """Whether a value is made of its shape alone, the same wherever it is made."""
    return node.op == "call_function" and node.target in family("constant")


def write_like(build: Builder, node: Node, type_: Type, scalars: dict[Node, Any]) -> Node:
    """The call for a value of ``type_``, which asks for no tensor; ``scalars`` are the sizes and numbers it may use."""
    call, value = Call(node), node.meta["val"]
    asked = {name: argument for name, argument in call.arguments.items() if name != "self"}
    arguments: dict[str, Any] = dict(torch.fx.map_arg(asked, scalars.__getitem__))
    given: torch.Tensor = call["self"].meta["val"]
    if call.op in family("factory"):
        like = build.call(aten.empty.memory_format, [0], dtype=given.dtype, device=given.device)
        return build.same(call, {**arguments, "self": like})
    sizes = shape_on_rank(shape_of(node), type_, build.ranks.size)
    # In memory as the program's own value: numbers are drawn in that order.
    order = memory_order(value)
    inverse = [order.index(d) for d in range(len(order))]
    laid = build.sizes([sizes[d] for d in order])
    if call.op in family("constant"):
        options = {"dtype": value.dtype, "device": value.device}
        if call.op is aten.empty_like.default:
            new = build.call(aten.empty.memory_format, laid, **options)
        else:
            fill = arguments["fill_value"] if "fill_value" in arguments else int(call.op is aten.ones_like.default)
            new = build.call(aten.full.default, laid, fill, **options)
        return build.permuted(new, inverse)
    like = build.call(aten.empty.memory_format, laid, dtype=given.dtype, device=given.device)
    return build.same(call, {**arguments, "self": build.permuted(like, inverse)})
