"""Tokens written into a slice: ``x[:, text:] = f(x[:, text:])``, once functional a ``slice_scatter``.

Where the slice is one or several segments of a split sequence, each rank writes its own rows, and nothing moves.  A
whole buffer that split tokens are written into becomes split itself: what is before them, they, what is after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.special.cat_and_cut import segments_between
from fxsp.types import Length, Segment, Sequence, Shard, Type, Used, as_length, same_length

__all__ = ["OverwritePlan", "decide_overwrite", "write_overwrite"]

aten = torch.ops.aten


@dataclass(frozen=True)
class OverwritePlan:
    """``Decision.detail``: the sequence that is written into, and which of its segments are replaced."""

    sequence: Sequence
    first: int
    last: int


def decide_overwrite(call: Call, types: list[Type]) -> Decision | None:
    """A decision where the slice is made of whole segments; else None."""
    if call.op is not aten.slice_scatter.default:
        return None
    shape = call.shape("self")
    dim = call.dim("dim", len(shape))
    if any(isinstance(t, Shard) and not (t.plain and t.dim == dim) for t in types):
        return None
    bounds = cut_bounds(call, shape[dim], dim)
    target, source = types
    if bounds is None:
        return None
    ((start, end),) = bounds
    if isinstance(target, Shard):
        sequence = target.sequence
    elif isinstance(source, Shard) and same_length(source.sequence.length, as_length(end - start)):
        sequence = _around(source.sequence, start, end, shape[dim])
    else:
        return None
    piece = segments_between(sequence, start, end)
    if piece is None:
        return None
    segments = sequence.segments[slice(*piece)]
    written: Type = Shard(dim, Sequence(segments)) if any(s.sharded for s in segments) else Used()
    result = Shard(dim, sequence, origin=f"{call.op} of whole segments")
    reason = ""
    if isinstance(source, Shard) and not source.same_as(written):
        reason = f"what is written is {source}, and its place is {written}"
    return Decision((result, written), (result,), reason, detail=OverwritePlan(sequence, *piece))


def _around(sequence: Sequence, start: Length, end: Length, length: Length) -> Sequence:
    layout = sequence.layout
    before = () if same_length(start, 0) else (Segment(start, layout=layout),)
    rest = as_length(length - end)
    after = () if same_length(rest, 0) else (Segment(rest, layout=layout),)
    return Sequence((*before, *sequence.segments, *after))


def write_overwrite(build: Builder, call: Call, arguments: dict[str, Any], plan: OverwritePlan) -> Node:
    """The same call, for the local rows of these segments."""
    rows = [s.local_length(build.ranks.size) for s in plan.sequence.segments]
    start, end = (as_length(sum(rows[:i], start=0)) for i in (plan.first, plan.last))
    args, kwargs = call.bound_to(arguments).rebuild(start=build.size(start), end=build.size(end), step=1)
    return build.call(call.op, *args, **kwargs)
