"""Operators that join and cut the sharded dimension itself.

``cat`` of sequences along their tokens makes a sequence of more segments, a cut at segment boundaries gives segments
back; both are local.  Along any other dimension these operators follow their factor rule.

Tokens are written into a slice (``x[:, text:] = f(x[:, text:])``, once functional a ``slice_scatter``) where it is one
or several segments: each rank writes its own rows, and nothing moves.  A whole buffer that split tokens are written
into becomes split itself: what is before them, they, what is after them.

One token of a split sequence (a class token, the last one) needs no gather of all of them: every rank adds up its own
rows with all but that one set to zero, a summand (Partial) of one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, facts, shape_of
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.passes.special.special import Local, Special
from fxsp.types import Length, Partial, Replicate, Segment, Sequence, Shard, Type, Used, as_length, same_length

__all__ = ["Cats", "Cuts", "Select", "SliceScatter"]

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
        layout = joined[0].sequence.layout
        one = all(t.sequence.layout == layout for t in joined)
        for shape, type_ in zip(shapes, types, strict=True):
            if isinstance(type_, Shard):
                operands.append(type_)
            elif same_length(shape[dim], 0):
                operands.append(Used())
                continue
            else:
                # A whole operand among sharded ones is split as a segment of its own: free, and evenly spread.
                own = Sequence.of(shape[dim], layout=layout if one else "contiguous")
                operands.append(Shard(dim, own, origin="joined to sharded tokens"))
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
        pieces = [_segments_between(type_.sequence, *bound) for bound in bounds or []]
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


class SliceScatter(Special):
    """Writes into whole segments: the same call, for the local rows of these segments."""

    ops = frozenset({aten.slice_scatter.default})

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
        piece = _segments_between(sequence, start, end)
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


def _segments_between(sequence: Sequence, start: Length, end: Length) -> tuple[int, int] | None:
    """Segments ``[i, j)`` that cover exactly the global positions ``[start, end)``."""
    parts = sequence.placed()
    first = next((i for i, (row, _, _) in enumerate(parts) if same_length(row, start)), None)
    ends = (as_length(row + rows) for row, rows, _ in reversed(parts))
    last = next((len(parts) - i for i, row in enumerate(ends) if same_length(row, end)), None)
    return None if first is None or last is None or first >= last else (first, last)


def _around(sequence: Sequence, start: Length, end: Length, length: Length) -> Sequence:
    layout = sequence.layout
    before = () if same_length(start, 0) else (Segment(start, layout=layout),)
    rest = as_length(length - end)
    after = () if same_length(rest, 0) else (Segment(rest, layout=layout),)
    return Sequence((*before, *sequence.segments, *after))
