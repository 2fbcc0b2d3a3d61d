"""The exchange of tokens for heads among consecutive ranks (DeepSpeed-Ulysses, arXiv:2309.14509): one all-to-all in,
one back.

``[B, H, L, D]`` with the tokens of a rank becomes ``[B, H/u, S, D]`` with all tokens of some heads, and the output goes
back.  Among all ranks, for two of them, four heads of 8, five tokens::

    %q, %k, %v: [B, 4, 3, 8]
    %pack_heads:   [2, 3, B 6, 8]    q, k, v by destination: rank, token, tensor, batch, head; written once
    %all_to_all:   [2, 3, B 6, 8]    by source: rank and token together are the global order
    %narrow:       [5, B 4, 8]       keys and values without pads: a narrow of the outermost dimension, a view
    %attention:    [1, B 2, 6, 8]    queries with pads: what becomes of a pad is a pad
    %reshape:      [2, 3, B 2, 8]    a view, since fused kernels write token by token
    %all_to_all:   [2, 3, B 2, 8]    by source: the heads of each rank
    %unpack_heads: [B, 3, 4, 8]      by token, as the output projection reads them
    %result:       [B, 4, 3, 8]      a view

Among the ``u`` ranks of one place of a ring it is the same, but that all rows of the place stay, pads included.  The
heads and tails of its ranks, put in order, are the head and the tail of the place.  Segments that are whole on every
rank stay at home.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.machine import Travel
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.question import Question
from fxsp.passes.graph import shape_of
from fxsp.types import Length, Sequence, as_length, product, same_length

__all__ = ["HeadExchange", "exchanging"]

aten = torch.ops.aten


def exchanging(method: str, question: Question, u: int, r: int = 1, margin: float | None = None) -> Way:
    """The way in which ``u`` ranks exchange heads, and keys and values go around a ring of ``r``."""
    spread = _spread(question, u)
    kv, q = as_length(question.kv_bytes * spread), _bytes_of_queries(question)
    exchanged, around = (q + kv) * (u - 1) / u, kv * (r - 1)
    sent, back = (_whole(exchanged + around * times) for times in (1, 1 + question.widened))
    refusal = (question.blocks_refusal if r > 1 else "") or question.heads_refusal(u, spread)
    exchanges, rotations = (2 if u > 1 else 0), r - 1
    backward = back if question.program.training else None
    times = 2 if backward else 1
    heads = _whole(times * exchanged) if r > 1 else as_length(sent + (backward or 0))
    others = as_length(sent + (backward or 0) - heads)
    travels = (
        Travel("all_to_all", u, times * exchanges, heads),
        Travel("neighbour", question.size, (2 * times - 1) * rotations, others),
    )
    return Way(
        method, sent, backward, exchanges + rotations, refusal, u, r, spread, margin=margin if spread == 1 else None,
        travels=travels,
    )  # fmt: skip


def _whole(n: Length | float) -> Length:
    return round(n) if isinstance(n, float) else as_length(n)


def _bytes_of_queries(question: Question) -> Length:
    """Local bytes of queries and output; the output brings rows of whole segments the other ranks' heads."""
    size, queries = question.size, question.queries
    assert queries is not None
    width = queries.split_length(size) * question.q[-1] + queries.local_length(size) * question.v[-1]
    return product((*question.q[:-2], as_length(width), question.like.element_size()))


def _spread(question: Question, size: int) -> int:
    """How often to repeat key/value heads before the exchange, so that they divide over the ranks; 1 if it is moot."""
    if len(question.q) != 4:
        return 1
    q, k = question.q[1], question.k[1]
    if not isinstance(q, int) or not isinstance(k, int) or q % k:
        return 1
    shared = q // k
    fits = (n for n in range(1, shared + 1) if shared % n == 0 and k * n % size == 0)
    return next(fits, 1)


def _share(heads: Length, size: int) -> int:
    """The heads of one of ``size`` ranks."""
    assert isinstance(heads, int)
    assert heads % size == 0
    return heads // size


@dataclass(frozen=True)
class HeadExchange:
    """The exchanges of one attention; ``[B, H, L, D]`` of a rank, ``[B, H/u, S, D]`` in between."""

    x: Attend
    #: How many consecutive ranks exchange heads.
    members: int
    #: Whether heads of different batch entries count as heads of one.
    batch_as_heads: bool = False

    @property
    def among_all(self) -> bool:
        return self.members == self.x.build.ranks.size

    def operands(self, queries_come: bool = False, keys_come: bool = False) -> list[Node]:
        """Queries, keys and values with all tokens of some heads; together as far as they are alike.

        ``queries_come``, ``keys_come``: they may stay as they come, the blocks of the ranks one after the other.
        """
        x = self.x
        q, k, v = (shape_of(n)[-1] for n in (x.q, x.k, x.v))
        queries, keys = (x.queries, queries_come), (x.keys, keys_come)
        if x.queries.same_as(x.keys) and same_length(q, v):
            return self.to_heads([x.q, x.k, x.v], *keys, 1 if queries_come and not keys_come else 0)
        if same_length(k, v):
            return [*self.to_heads([x.q], *queries), *self.to_heads([x.k, x.v], *keys)]
        return [y for n, how in ((x.q, queries), (x.k, keys), (x.v, keys)) for y in self.to_heads([n], *how)]

    def to_heads(self, tensors: list[Node], sequence: Sequence, as_they_come: bool, first: int = 0) -> list[Node]:
        """``[B, H, L, D]`` each, split by tokens -> ``[B, H/u, S, D]`` each, split by heads; one all-to-all.

        ``as_they_come``: ``[B, H/u, u L, D]``, the blocks of the ranks one after the other; so are the ``first``
        tensors anyway.
        """
        build = self.x.build
        heads = [_share(shape_of(x)[1], self.members) for x in tensors]
        packed = build.pack_heads(tensors, sequence.local_length(build.ranks.size), self.members)  # [u, L, B h, D]
        moved, split = packed, Sequence(tuple(s for s in sequence.segments if s.sharded))
        if any(sequence.whole):
            kept = [build.narrow(packed, 1, at, n) for at, n, s in sequence.placed(build.ranks.size) if s.sharded]
            moved = build.call(aten.cat.default, kept, 1)
        received = self._all_to_all(moved, split, sum(heads), shape_of(tensors[0])[-1])  # by source
        batch = self.x.shape[0]
        done = self._apart(self._blocks(received), heads[:first]) if first else []
        if first:
            start, left = (product((batch, sum(part))) for part in (heads[:first], heads[first:]))
            received = build.narrow(received, 2, start, left)
        tokens = self._blocks(received) if as_they_come else self._ordered(received, split)
        if any(sequence.whole):
            tokens = self._with_whole(tokens, packed, sequence)
        return done + self._apart(tokens, heads[first:], alone=len(heads) == first + 1)

    def to_tokens(self, out: Node, sequence: Sequence, as_they_come: bool = False) -> Node:
        """``[B, H/u, S, D]`` split by heads -> ``[B, H, L, D]`` split by tokens; one all-to-all."""
        build, call = self.x.build, self.x.build.call
        size = build.ranks.size
        batch, all_heads, _, width = self.x.shape
        heads, length = _share(all_heads, self.members), sequence.local_length(size)
        rows = call(aten.permute.default, out, [2, 0, 1, 3])  # [S, B, h, D], or [S, 1, B h, D]
        if not self.among_all:
            rows = build.deal(rows, 0, self._between(sequence), self.members)
        by_rank = not self.among_all or not (sequence.has_pads(size) or any(sequence.head_tail))
        if as_they_come or (len(sequence.segments) == 1 and by_rank):
            sizes = build.sizes([self.members, length, product((batch, heads)), width])
            packed = call(aten.contiguous.default, call(aten.reshape.default, rows, sizes))
        elif self.among_all and not any(sequence.whole):
            packed = call(aten.flatten.using_ints, build.pack(rows, sequence), 2, 3)
        else:
            packed = call(aten.flatten.using_ints, self._packed(rows, sequence, heads), 2, 3)
        # Rows of whole segments travel to every rank with these heads.
        received = self._all_to_all(packed, sequence, heads, width)
        # [u, L, B h, D] -> [B, L, u h, D], as the output projection reads it; then heads in front by strides.
        return call(aten.transpose.int, build.unpack_heads(received, [heads], length), 1, 2)

    def _between(self, sequence: Sequence) -> Sequence:
        """In between: all tokens, or all rows of the ranks of a place."""
        if self.among_all:
            return sequence
        rows = sequence.placed(self.x.build.ranks.size)
        return Sequence(
            tuple(replace(s, length=as_length(n * self.members), unit=1) if s.sharded else s for _, n, s in rows)
        )

    # Pieces.

    def _blocks(self, received: Node) -> Node:
        """``[u, L, B h, D]`` -> ``[u L, B h, D]``, a view."""
        return self.x.build.call(aten.flatten.using_ints, received, 0, 1)

    def _ordered(self, received: Node, split: Sequence) -> Node:
        """``[u, L, B h, D]`` by source -> ``[S, B h, D]``, each segment in order."""
        build, several = self.x.build, len(split.segments) > 1
        if not self.among_all:
            between = self._between(split)
            if several:
                tokens = build.call(_ops.unpack.default, received, build.sizes(between.lengths), self.members)
            else:
                tokens = self._blocks(received)
            return build.undeal(tokens, 0, between, self.members)
        if several or any(split.head_tail):
            return build.unpack(received, split)
        tokens = self._blocks(received)
        return build.narrow(tokens, 0, 0, split.length) if split.has_pads(self.members) else tokens

    def _with_whole(self, tokens: Node, packed: Node, sequence: Sequence) -> Node:
        """A segment that is whole on every rank stays at home: of its rows each rank keeps those of its own heads."""
        build, parts = self.x.build, []
        start: Length = 0
        for (local, _, segment), (_, count, _) in zip(
            sequence.placed(build.ranks.size), self._between(sequence).placed(), strict=True
        ):
            if segment.sharded:
                parts.append(build.narrow(tokens, 0, start, count))
                start = as_length(start + count)
            else:
                own = build.take(build.narrow(packed, 1, local, count), 0, self.members)
                parts.append(build.call(aten.squeeze.dim, own, 0))
        return build.call(aten.cat.default, parts, 0)

    def _packed(self, rows: Node, sequence: Sequence, heads: int) -> Node:
        """``[S, B, h, D]`` -> ``[u, L, B, h, D]`` by destination, segment by segment."""
        build, blocks = self.x.build, []
        batch, _, _, width = self.x.shape
        inner = [1, product((batch, heads))] if self.batch_as_heads else [batch, heads]
        for (_, n, _), (start, count, segment) in zip(
            sequence.placed(build.ranks.size), self._between(sequence).placed(), strict=True
        ):
            part = build.narrow(rows, 0, start, count)
            if segment.sharded and self.among_all:
                blocks.append(build.pack(part, Sequence((segment,))))
            else:
                laid = aten.reshape.default if segment.sharded else aten.expand.default
                blocks.append(build.call(laid, part, build.sizes([self.members, n, *inner, width])))
        return build.call(aten.cat.default, blocks, 1)

    def _apart(self, tokens: Node, heads: Seq[int], *, alone: bool = False) -> list[Node]:
        """``[S, B h, D]`` -> ``[B, h_i, S, D]`` each, or ``[1, B h_i, S, D]``, views; ``alone``: of one tensor."""
        build, batch = self.x.build, self.x.shape[0]
        turned, parts = build.call(aten.permute.default, tokens, [1, 0, 2]), []
        for i, h in enumerate(heads):
            start, count = product((batch, sum(heads[:i]))), product((batch, h))
            part = turned if alone else build.narrow(turned, 0, start, count)
            if self.batch_as_heads:
                parts.append(build.call(aten.unsqueeze.default, part, 0))
            else:
                parts.append(build.call(aten.unflatten.int, part, 0, [-1, h]))
        return parts

    def _all_to_all(self, packed: Node, tokens: Sequence, heads: int, width: Length) -> Node:
        build, u = self.x.build, self.members
        new = build.all_to_all(packed, u)
        rows = tokens.local_length(build.ranks.size)
        sent = product((u - 1, rows, self.x.shape[0], heads, width, self.x.itemsize))
        why = f"tokens and heads of an attention{'' if self.among_all else ', within a place of the ring'}"
        build.record("all_to_all", new, sent, why, tokens, 0 if self.among_all else u)
        return new
