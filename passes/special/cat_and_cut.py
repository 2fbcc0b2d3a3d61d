"""Operators that join and cut the sharded dimension itself.

``cat`` of sequences along their tokens makes a sequence of more segments, a cut at segment boundaries gives segments
back; both are local.  Along any other dimension these operators follow their factor rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, shape_of
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Layout, Length, Replicate, Segment, Sequence, Shard, Type, Used, as_length, same_length

__all__ = ["Cats", "Cuts", "segments_between"]

aten = torch.ops.aten


class Cats(Special):
    """Sequences along their tokens: one of more segments; the local call is the same."""

    ops = family("cat")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        shapes = call.operand_shapes()
        rank = len(shapes[0])
        if any(len(s) != rank for s in shapes):
            return None
        dim = call.dim("dim", rank)
        joined = [t for t in types if isinstance(t, Shard) and t.dim == dim]
        if not joined or any(isinstance(t, Shard) and (t.dim != dim or not t.plain) for t in types):
            return None
        segments: list[Segment] = []
        operands: list[Type] = []
        layouts = {t.sequence.layout for t in joined}
        layout: Layout = layouts.pop() if len(layouts) == 1 else "contiguous"
        for shape, type_ in zip(shapes, types, strict=True):
            if isinstance(type_, Shard):
                operands.append(type_)
            elif same_length(shape[dim], 0):
                operands.append(Used())
                continue
            else:
                # A whole operand among sharded ones is split as a segment of its own: free, and evenly spread.
                operands.append(Shard(dim, Sequence.of(shape[dim], layout=layout), origin="joined to sharded tokens"))
            segments.extend(operands[-1].sequence.segments)  # type: ignore[union-attr]
        result = Shard(dim, Sequence(tuple(segments)), origin=f"{call.op} along the tokens")
        return Decision(tuple(operands), (result,))


class Cuts(Special):
    """Cuts at segment boundaries: a narrow of the local rows."""

    ops = family("slice", "split")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        (type_,) = types
        if not isinstance(type_, Shard):
            return None
        shape = shape_of(call.operands[0])
        dim = call.dim("dim", len(shape))
        bounds = cut_bounds(call, shape[dim], dim) if type_.dim == dim and type_.plain else None
        pieces = [segments_between(type_.sequence, *bound) for bound in bounds or []]
        if bounds is None or None in pieces:
            return None
        results: list[Type] = []
        for first, last in filter(None, pieces):
            segments = type_.sequence.segments[first:last]
            if any(s.sharded for s in segments):
                results.append(Shard(dim, Sequence(segments), origin=f"{call.op} at segment boundaries"))
            else:
                results.append(Replicate(origin=f"{call.op}: the segment is whole on every rank"))
        return Decision((type_,), tuple(results), detail=pieces, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node | list[Any]:
        build, (source,) = local.build, decision.operands
        assert isinstance(source, Shard)
        x, *_ = local.arguments(call, decision).values()
        pieces = []
        rows = source.sequence.placed(build.ranks.size)
        for (first, last), type_ in zip(decision.detail, decision.results, strict=True):
            piece = x
            if (first, last) != (0, len(rows)):
                count = as_length(sum(n for _, n, _ in rows[first:last]))
                piece = build.narrow(x, source.dim, rows[first][0], count)
            if isinstance(type_, Replicate) and build.training:
                length = as_length(sum(source.sequence.lengths[first:last], start=0))
                moved = build.call(aten.movedim.int, piece, source.dim, 0)
                piece = build.call(aten.movedim.int, build.leave(moved, length), 0, source.dim)
            pieces.append(piece)
        return pieces if isinstance(call.node.meta["val"], (tuple, list)) else pieces[0]


def segments_between(sequence: Sequence, start: Length, end: Length) -> tuple[int, int] | None:
    """Segments ``[i, j)`` that cover exactly the global positions ``[start, end)``."""
    parts = sequence.placed()
    first = next((i for i, (row, _, _) in enumerate(parts) if same_length(row, start)), None)
    ends = (as_length(row + rows) for row, rows, _ in reversed(parts))
    last = next((len(parts) - i for i, row in enumerate(ends) if same_length(row, end)), None)
    return None if first is None or last is None or first >= last else (first, last)
