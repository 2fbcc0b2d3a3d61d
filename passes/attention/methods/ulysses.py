"""The exchange of tokens for heads (DeepSpeed-Ulysses, arXiv:2309.14509): one all-to-all in, and one back.

``[B, H, L, D]`` with the tokens of a rank becomes ``[B, H/P, S, D]`` with all tokens of some heads, and the output goes
back.  Segments that are whole on every rank stay at home.  The layouts are those of
:mod:`fxsp.passes.attention.lower_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts
from fxsp.types import Length, Segment, Sequence, as_length, product

__all__ = ["HeadExchange", "apart", "share"]

aten = torch.ops.aten


def apart(
    build: Builder,
    tokens: Node,
    batch: Length,
    heads: Seq[int],
    *,
    alone: bool = False,
    batch_as_heads: bool = False,
) -> list[Node]:
    """``[S, B h, D]`` -> ``[B, h_i, S, D]`` each, or ``[1, B h_i, S, D]``, views; ``alone``: of one tensor."""
    turned = build.call(aten.permute.default, tokens, [1, 0, 2])
    parts = []
    for i, h in enumerate(heads):
        start, count = product((batch, sum(heads[:i]))), product((batch, h))
        part = turned if alone else build.narrow(turned, 0, start, count)
        if batch_as_heads:
            parts.append(build.call(aten.unsqueeze.default, part, 0))
        else:
            parts.append(build.call(aten.unflatten.int, part, 0, [-1, h]))
    return parts


@dataclass(frozen=True)
class HeadExchange:
    """The exchanges of one attention among all ranks."""

    build: Builder
    #: Global shape of the output, heads first: ``[B, H, S, E]``.
    shape: Seq[Length]
    itemsize: int
    #: Whether heads of different batch entries count as heads of one.
    batch_as_heads: bool

    @property
    def size(self) -> int:
        return self.build.ranks.size

    def _split_whole(self, sequence: Sequence) -> tuple[list[tuple[int, Length, Length, Segment]], Sequence]:
        """Segments with their local and global starts, and the sequence of those that are split."""
        places = []
        local: Length = 0
        start: Length = 0
        for i, segment in enumerate(sequence.segments):
            places.append((i, local, start, segment))
            local = as_length(local + segment.local_length(self.size))
            start = as_length(start + segment.length)
        return places, Sequence(tuple(s for s in sequence.segments if s.sharded))

    def to_heads(self, tensors: list[Node], sequence: Sequence, as_they_come: bool, first: int = 0) -> list[Node]:
        """``[B, H, L, D]`` each, split by tokens -> ``[B, H/P, S, D]`` each, split by heads; one all-to-all.

        ``as_they_come``: ``[B, H/P, P L, D]``, the blocks of the ranks one after the other; so are the ``first``
        tensors anyway.
        """
        heads = [share(_global(x, 1), self.size) for x in tensors]
        split, packed, received = self._exchange_to_heads(tensors, heads, sequence)
        batch = self.shape[0]
        done = self._apart(self._blocks(received), heads[:first]) if first else []
        if first:
            starts, left = (product((batch, sum(part))) for part in (heads[:first], heads[first:]))
            received = self.build.narrow(received, 2, starts, left)
        if as_they_come:
            tokens = self._blocks(received)
        elif len(split.segments) > 1 or any(split.head_tail):
            tokens = self.build.unpack(received, split)
        else:
            tokens = self._blocks(received)
            if split.has_pads(self.size):
                tokens = self.build.narrow(tokens, 0, 0, split.length)
        if any(sequence.whole):
            tokens = self._with_whole(tokens, packed, sequence)
        return done + self._apart(tokens, heads[first:], alone=len(heads) == first + 1)

    def _apart(self, tokens: Node, heads: list[int], *, alone: bool = False) -> list[Node]:
        return apart(self.build, tokens, self.shape[0], heads, alone=alone, batch_as_heads=self.batch_as_heads)

    def _blocks(self, received: Node) -> Node:
        """``[P, L, B h, D]`` -> ``[P L, B h, D]``, a view."""
        return self.build.call(aten.flatten.using_ints, received, 0, 1)

    def _exchange_to_heads(
        self, tensors: list[Node], heads: list[int], sequence: Sequence
    ) -> tuple[Sequence, Node, Node]:
        """The segments that travel; ``[P, L, B h, D]`` by destination; the same of those segments, by source."""
        places, split = self._split_whole(sequence)
        packed = self.build.pack_heads(tensors, sequence.local_length(self.size), self.size)
        moved = packed
        if any(sequence.whole):
            kept = [
                self.build.narrow(packed, 1, local, s.local_length(self.size)) for _, local, _, s in places if s.sharded
            ]
            moved = self.build.call(aten.cat.default, kept, 1)
        width, batch = _global(tensors[0], -1), _global(tensors[0], 0)
        return split, packed, self._all_to_all(moved, split, sum(heads), width, batch)

    def _with_whole(self, tokens: Node, packed: Node, sequence: Sequence) -> Node:
        """A segment that is whole on every rank stays at home: of its rows each rank keeps those of its own heads."""
        parts = []
        start: Length = 0
        for _, local, _, segment in self._split_whole(sequence)[0]:
            if segment.sharded:
                parts.append(self.build.narrow(tokens, 0, start, segment.length))
                start = as_length(start + segment.length)
            else:
                own = self.build.take(self.build.narrow(packed, 1, local, segment.length), 0)
                parts.append(self.build.call(aten.squeeze.dim, own, 0))
        return self.build.call(aten.cat.default, parts, 0)

    def to_tokens(self, out: Node, sequence: Sequence, as_they_come: bool) -> Node:
        """``[B, H/P, S, D]`` split by heads -> ``[B, H, L, D]`` split by tokens; one all-to-all."""
        call = self.build.call
        places, split = self._split_whole(sequence)
        batch, all_heads, _, width = self.shape
        heads = share(all_heads, self.size)
        rows = call(aten.permute.default, out, [2, 0, 1, 3])  # [S, B, h, D], or [S, 1, B h, D]
        if any(sequence.whole):
            packed = call(aten.flatten.using_ints, self._pack_with_whole(rows, places, heads), 2, 3)
        elif as_they_come or (len(split.segments) == 1 and not split.has_pads(self.size) and not any(split.head_tail)):
            sizes = self.build.sizes([self.size, split.local_length(self.size), product((batch, heads)), width])
            packed = call(aten.contiguous.default, call(aten.reshape.default, rows, sizes))
        else:
            packed = call(aten.flatten.using_ints, self.build.pack(rows, split), 2, 3)
        # Rows of whole segments travel to every rank with these heads.
        received = self._all_to_all(packed, sequence, heads, width, batch)
        # [P, L, B h, D] -> [B, L, P h, D], as the output projection reads it; then heads in front by strides.
        merged = self.build.unpack_heads(received, [heads], sequence.local_length(self.size))
        return call(aten.transpose.int, merged, 1, 2)

    def _pack_with_whole(self, rows: Node, places: list[Any], heads: int) -> Node:
        batch, _, _, width = self.shape
        blocks = []
        for _, _, start, segment in places:
            part = self.build.narrow(rows, 0, start, segment.length)
            if segment.sharded:
                blocks.append(self.build.pack(part, Sequence((segment,))))
            else:
                inner = [1, product((batch, heads))] if self.batch_as_heads else [batch, heads]
                sizes = self.build.sizes([self.size, segment.length, *inner, width])
                blocks.append(self.build.call(aten.expand.default, part, sizes))
        return self.build.call(aten.cat.default, blocks, 1)

    def _all_to_all(self, x: Node, sequence: Sequence, heads: int, width: Length, batch: Length) -> Node:
        new = self.build.all_to_all(x)
        elements = (self.size - 1) * sequence.local_length(self.size) * batch * heads * width
        sent = as_length(elements * self.itemsize)
        self.build.record("all_to_all", new, sent, "tokens and heads of an attention", sequence)
        return new


def _global(x: Node, dim: int) -> Length:
    return as_length(facts(x).whole.shape[dim])


def share(heads: Length, size: int) -> int:
    """The heads of one of ``size`` ranks."""
    assert isinstance(heads, int)
    assert heads % size == 0
    return heads // size
