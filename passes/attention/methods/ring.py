"""Ring attention, and Ulysses within a ring, as nodes of the local graph.

Ring, for two ranks, four heads of 8, five tokens::

    %q, %k, %v:      [B, 4, 3, 8]
    %ring_attention: [B, 4, 3, 8], [B, 4, 3], [B, 4, 3]    one node until *emit*: what it does differs by rank

Hybrid, for ``u * r`` ranks: ``u`` consecutive ranks exchange heads for tokens, so that together they are one place of a
ring of ``r``; keys and values go from rank ``i`` to ``i + u``; then the output is exchanged back.  The heads and tails
of ``u`` ranks, put in order, are the head and the tail of the place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.passes.attention.decide import AttentionChoice
from fxsp.passes.attention.methods.ulysses import apart, share
from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts, mark
from fxsp.types import Length, Sequence, as_length, product, same_length

__all__ = ["lower_ring"]

aten = torch.ops.aten


def lower_ring(
    build: Builder, choice: AttentionChoice, q: Node, k: Node, v: Node, arguments: dict[str, Any], exact: bool
) -> Node:
    """The attention of ``choice`` (ring or hybrid) on local operands; its local output.

    ``exact``: one device would write it out (:mod:`fxsp.kernels.attention.own_kernel`).
    """
    return _Ring(build, choice, [q, k, v]).lower(q, k, v, arguments, {"exact": True} if exact else {})


class _Ring:
    def __init__(self, build: Builder, choice: AttentionChoice, tensors: Seq[Node]) -> None:
        assert choice.keys is not None
        assert choice.queries is not None
        self.build = build
        self.queries, self.keys = choice.queries, choice.keys
        self.ulysses, self.ring = choice.ulysses, choice.ring
        self.shapes = [[as_length(n) for n in facts(x).whole.shape] for x in tensors]
        self.itemsize = facts(tensors[0]).whole.element_size()
        self.device = facts(tensors[0]).whole.device

    def lower(self, q: Node, k: Node, v: Node, arguments: dict[str, Any], more: dict[str, Any]) -> Node:
        mask = arguments.get("attn_mask")
        if self.ulysses > 1:
            q, k, v = self._to_places(q, k, v)
            mask = self._mask_of_place(mask) if isinstance(mask, Node) else mask
        ranks = self.build.ranks
        both = self.build.call(
            _ops.ring_attention.default, q, k, v, mask, *self._sequence(self.queries), *self._sequence(self.keys),
            bool(arguments.get("is_causal")), arguments.get("scale"), self.ulysses, ranks.rank, ranks.size, ranks.group,
            *self._more(arguments.get("window"), arguments.get("dropout_p")), **more,
        )  # fmt: skip
        out = self.build.call(operator.getitem, both, 0)
        self._record_rotations(both)
        return self._to_ranks(out) if self.ulysses > 1 else out

    def _more(self, window: Any, dropout_p: Any) -> list[Any]:
        """Layouts, window, dropout and units, as far as they are not the default."""
        layouts = self.build.layouts(self.queries, self.keys)
        units = [self.build.sizes(s.units) if any(n != 1 for n in s.units) else [] for s in (self.queries, self.keys)]
        if dropout_p or any(units):
            seed = self.build.seed(self.device) if dropout_p else None
            last = units if any(units) else []
            return [*(layouts or ([], [])), window, float(dropout_p or 0.0), seed, *last]
        return layouts if window is None else [*(layouts or ([], [])), window]

    def _sequence(self, sequence: Sequence) -> tuple[list[int | Node], list[bool]]:
        return self.build.sizes(sequence.lengths), list(sequence.whole)

    def _record_rotations(self, both: Node) -> None:
        (batch, heads, _, width), value = self.shapes[1], self.shapes[2]
        # After an exchange, u times the rows of a u-th of the heads.
        rows = self.keys.split_length(self.build.ranks.size)
        sent = product((batch, heads, rows, as_length(width + value[3]), self.itemsize))
        for _ in range(self.ring - 1):
            self.build.record("rotation", both, sent, "keys and values of an attention, one place on", self.keys)
        mark(both, sent=as_length(sent * (self.ring - 1)))

    # Ulysses within a place of the ring.

    def _to_places(self, q: Node, k: Node, v: Node) -> list[Node]:
        """``[B, H, L, D]`` of each rank -> ``[B, H/u, u*L, D]`` of each place, tokens in the order of the sequence."""
        widths = [s[3] for s in self.shapes]
        if self.queries.same_as(self.keys) and all(same_length(w, widths[0]) for w in widths):
            return self._to_heads([q, k, v], self.shapes, self.queries)
        (q,) = self._to_heads([q], self.shapes[:1], self.queries)
        if same_length(widths[1], widths[2]):
            return [q, *self._to_heads([k, v], self.shapes[1:], self.keys)]
        return [q, *self._to_heads([k], self.shapes[1:2], self.keys), *self._to_heads([v], self.shapes[2:], self.keys)]

    def _to_heads(self, tensors: list[Node], shapes: Seq[Seq[Length]], sequence: Sequence) -> list[Node]:
        call, u = self.build.call, self.ulysses
        heads = [share(shape[1], u) for shape in shapes]
        packed = self.build.pack_heads(tensors, sequence.local_length(self.build.ranks.size), u)  # [u, L, B h, D]
        places = self._places(sequence)
        split = [p for p, s in zip(places, sequence.segments, strict=True) if s.sharded]
        head_tail = [s.head_tail for s in sequence.segments if s.sharded]
        moved = packed
        if len(split) < len(places):
            moved = call(aten.cat.default, [self.build.narrow(packed, 1, start, n) for start, n in split], 1)
        width = as_length(product((shapes[0][0], sum(heads), shapes[0][3])))
        tokens_sent = Sequence(tuple(s for s in sequence.segments if s.sharded))
        received = self._exchange(moved, as_length(sum((n for _, n in split), start=0)), width, tokens_sent)
        tokens = self._unpacked(received, [n for _, n in split], head_tail)
        if len(split) < len(places):
            # A whole segment stays at home: of its rows each rank keeps those of its own heads.
            parts = []
            start: Length = 0
            for (local, n), segment in zip(places, sequence.segments, strict=True):
                if segment.sharded:
                    parts.append(self.build.narrow(tokens, 0, start, as_length(u * n)))
                    start = as_length(start + u * n)
                else:
                    own = call(
                        _ops.take.default, self.build.narrow(packed, 1, local, n), 0, self.build.ranks.rank % u, u
                    )
                    parts.append(call(aten.squeeze.dim, own, 0))
            tokens = call(aten.cat.default, parts, 0)
        return apart(self.build, tokens, shapes[0][0], heads)

    def _to_ranks(self, out: Node) -> Node:
        """``[B, H/u, u*L, E]`` of a place -> ``[B, H, L, E]`` of each of its ranks."""
        call, u = self.build.call, self.ulysses
        batch, width = self.shapes[0][0], self.shapes[2][3]
        heads = share(self.shapes[0][1], u)
        rows = call(aten.permute.default, out, [2, 0, 1, 3])
        counts = [
            as_length(u * n) if segment.sharded else n
            for (_, n), segment in zip(self._places(self.queries), self.queries.segments, strict=True)
        ]
        rows = self.build.deal(rows, 0, counts, self.queries.head_tail, u)
        blocks = []
        start: Length = 0
        for count, (_, n), segment in zip(counts, self._places(self.queries), self.queries.segments, strict=True):
            part = self.build.narrow(rows, 0, start, count)
            start = as_length(start + count)
            sizes = self.build.sizes([u, n, batch, heads, width])
            blocks.append(call(aten.reshape.default if segment.sharded else aten.expand.default, part, sizes))
        packed = call(aten.cat.default, blocks, 1) if len(blocks) > 1 else call(aten.contiguous.default, blocks[0])
        packed = call(aten.flatten.using_ints, packed, 2, 3)
        length = self.queries.local_length(self.build.ranks.size)
        # Rows of whole segments travel to every rank of the place with these heads.
        received = self._exchange(packed, length, as_length(product((batch, heads, width))), self.queries)
        return call(aten.transpose.int, self.build.unpack_heads(received, [heads], length), 1, 2)

    def _places(self, sequence: Sequence) -> list[tuple[Length, Length]]:
        """Per segment: its first row on a rank, and the number of its rows there."""
        result = []
        start: Length = 0
        for segment in sequence.segments:
            rows = segment.local_length(self.build.ranks.size)
            result.append((start, rows))
            start = as_length(start + rows)
        return result

    def _unpacked(self, received: Node, rows: list[Length], head_tail: list[bool]) -> Node:
        """``[u, L, ...]`` by rank -> ``[u*L, ...]``, each segment in order; pads stay."""
        lengths = [as_length(self.ulysses * n) for n in rows]
        if len(rows) == 1:
            tokens = self.build.call(aten.flatten.using_ints, received, 0, 1)
        else:
            tokens = self.build.call(_ops.unpack.default, received, self.build.sizes(lengths), self.ulysses)
        return self.build.undeal(tokens, 0, lengths, head_tail, self.ulysses)

    def _exchange(self, x: Node, rows: Length, width: Length, tokens: Sequence) -> Node:
        ranks = self.build.ranks
        new = self.build.call(_ops.all_to_all_within.default, x, ranks.rank, ranks.size, ranks.group)
        sent = product((self.ulysses - 1, rows, width, self.itemsize))
        why = "tokens and heads of an attention, within a place of the ring"
        self.build.record("all_to_all", new, sent, why, tokens, self.ulysses)
        return new

    def _mask_of_place(self, mask: Node) -> Node:
        """A whole mask -> the rows of this place's queries, and the heads of this rank."""
        shape = [as_length(n) for n in facts(mask).whole.shape]
        ranks, device = self.build.ranks, facts(mask).whole.device
        if len(shape) >= 3 and not same_length(shape[-3], 1):
            mask = self.build.call(_ops.take.default, mask, len(shape) - 3, ranks.rank % self.ulysses, self.ulysses)
        if len(shape) >= 2 and not (same_length(shape[-2], 1) and not same_length(self.queries.length, 1)):
            rows = self.build.call(
                _ops.place_positions.default, *self._sequence(self.queries), self.ulysses, ranks.rank, ranks.size,
                device, *self.build.placed(self.queries),
            )  # fmt: skip
            mask = self.build.call(aten.index_select.default, mask, len(shape) - 2, rows)
        return mask
