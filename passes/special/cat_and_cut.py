"""Decisions for operators that join and cut the sharded dimension itself.

``cat`` of sequences along their tokens makes a sequence of more segments, a cut at segment boundaries gives segments
back; both are local.  Along any other dimension these operators follow their factor rule.
"""

from __future__ import annotations

from fxsp.passes.graph import Call, shape_of
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.types import Layout, Length, Replicate, Segment, Sequence, Shard, Type, Used, as_length, same_length

__all__ = ["decide_structure", "segments_between"]


def decide_structure(call: Call, types: list[Type]) -> Decision | None:
    """A decision, or None where the factor rule decides."""
    if call.op in family("cat"):
        return _cat(call, types)
    if call.op in family("slice", "split"):
        return _cut(call, types)
    return None


def _cat(call: Call, types: list[Type]) -> Decision | None:
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


def _cut(call: Call, types: list[Type]) -> Decision | None:
    (type_,) = types
    if not isinstance(type_, Shard):
        return None
    shape = shape_of(call.operands[0])
    dim = call.dim("dim", len(shape))
    if type_.dim != dim or not type_.plain:
        return None
    bounds = cut_bounds(call, shape[dim], dim)
    if bounds is None:
        return None
    results: list[Type] = []
    pieces: list[tuple[int, int]] = []
    for start, end in bounds:
        piece = segments_between(type_.sequence, start, end)
        if piece is None:
            return None
        pieces.append(piece)
        segments = type_.sequence.segments[piece[0] : piece[1]]
        if any(s.sharded for s in segments):
            results.append(Shard(dim, Sequence(segments), origin=f"{call.op} at segment boundaries"))
        else:
            results.append(Replicate(origin=f"{call.op}: the segment is whole on every rank"))
    return Decision((type_,), tuple(results), detail=pieces)


def segments_between(sequence: Sequence, start: Length, end: Length) -> tuple[int, int] | None:
    """Segments ``[i, j)`` that cover exactly the global positions ``[start, end)``."""
    position: Length = 0
    edges: list[Length] = [0]
    for segment in sequence.segments:
        position = as_length(position + segment.length)
        edges.append(position)
    first = next((i for i, e in enumerate(edges) if same_length(e, start)), None)
    last = next((i for i, e in reversed(list(enumerate(edges))) if same_length(e, end)), None)
    if first is None or last is None or first >= last:
        return None
    return first, last
