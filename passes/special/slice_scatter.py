"""Tokens written into a slice: ``x[:, text:] = f(x[:, text:])``, once functional a ``slice_scatter``.

Where the slice is one or several segments of a split sequence, each rank writes its own rows, and nothing moves.  A
whole buffer that split tokens are written into becomes split itself: what is before them, they, what is after them.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.special.cat_and_cut import segments_between
from fxsp.passes.special.special import Local, Special
from fxsp.types import Length, Segment, Sequence, Shard, Type, Used, as_length, same_length

__all__ = ["SliceScatter"]


class SliceScatter(Special):
    """Writes into whole segments: the same call, for the local rows of these segments."""

    ops = frozenset({torch.ops.aten.slice_scatter.default})

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
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
        return Decision((result, written), (result,), reason, detail=piece, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node:
        build, arguments, (result,) = local.build, local.arguments(call, decision), decision.results
        assert isinstance(result, Shard)
        rows = result.sequence.placed(build.ranks.size)[slice(*decision.detail)]
        start, end = (build.size(n) for n in (rows[0][0], as_length(rows[-1][0] + rows[-1][1])))
        return build.same(call, arguments, start=start, end=end, step=1)


def _around(sequence: Sequence, start: Length, end: Length, length: Length) -> Sequence:
    layout = sequence.layout
    before = () if same_length(start, 0) else (Segment(start, layout=layout),)
    rest = as_length(length - end)
    after = () if same_length(rest, 0) else (Segment(rest, layout=layout),)
    return Sequence((*before, *sequence.segments, *after))
