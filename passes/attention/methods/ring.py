"""Ring attention, and Ulysses within a ring (USP), as nodes of the local graph.

Ring, for two ranks, four heads of 8, five tokens::

    %q, %k, %v:      [B, 4, 3, 8]
    %ring_attention: [B, 4, 3, 8], [B, 4, 3], [B, 4, 3]    one node until *emit*: what it does differs by rank

Hybrid, for ``u * r`` ranks: ``u`` consecutive ranks exchange heads for tokens, so that together they are one place of a
ring of ``r``; keys and values go from rank ``i`` to ``i + u``; then the output is exchanged back.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.kernels.attention.ring_blocks import pairs_of
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.lengths import hint
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.exchange import HeadExchange, exchanging
from fxsp.passes.attention.method import Method
from fxsp.passes.attention.question import AttentionChoice, Question
from fxsp.passes.graph import Call, mark, shape_of
from fxsp.types import Type, Used, as_length, product, same_length

__all__ = ["Hybrid", "Ring"]

aten = torch.ops.aten


class Ring(Method):
    """Legal where blocks of the attention can be merged."""

    name = "ring"

    def ways(self, question: Question) -> Iterator[Way]:
        if question.queries is not None and question.keys is not None:
            for u in self._heads_among(question.size):
                yield exchanging(self.name, question, u, question.size // u)

    def _heads_among(self, size: int) -> Iterator[int]:
        """Between how many ranks heads may be exchanged, the most first."""
        yield from (1,) if size > 1 else ()

    def asked(self, degrees: AttentionDegrees) -> str:
        return f"ring_degree={degrees.ring}" if (degrees.ring or 1) > 1 and degrees.ulysses == 1 else ""

    def work(self, call: Call, choice: AttentionChoice) -> str:
        """The layout of a causal ring, and how many pairs of a query and a key the ranks compute."""
        if choice.queries is None or not self._is_causal(call, choice):
            return ""
        text = f"{choice.queries.layout} tokens"
        if not all(isinstance(n, int) for n in choice.queries.lengths):
            return text
        found = _pairs(call, choice, choice.queries.head_tail)
        return f"{text}, {min(found):,} to {max(found):,} pairs of a query and a key for each head on a rank"

    def _is_causal(self, call: Call, choice: AttentionChoice) -> bool:
        """Whether ranks have unequal work if their tokens are contiguous, but for a window."""
        queries, keys = choice.queries, choice.keys
        return choice.op.causal_in(call) and queries is not None and keys is not None and queries.same_as(keys)

    def wants_head_tail(self, call: Call, choice: AttentionChoice) -> bool:
        if choice.queries is None or not self._is_causal(call, choice):
            return False
        contiguous, dealt = ([flag and s.sharded for s in choice.queries.segments] for flag in (False, True))
        no_window = choice.op.window_in(call) is None
        return no_window or max(_pairs(call, choice, contiguous)) > max(_pairs(call, choice, dealt))

    def lower(self, x: Attend) -> Node:
        return self._node(x, x.q, x.k, x.v, x.mask)

    def _node(self, x: Attend, q: Node, k: Node, v: Node, mask: Any) -> Node:
        build, choice = x.build, x.choice
        both = build.call(
            _ops.ring_attention.default, q, k, v, mask, *build.sequence(x.queries), *build.sequence(x.keys),
            bool(x.causal), x.args.get("scale"), choice.ulysses, *build.at_rank(), *_more(x), **x.exact,
        )  # fmt: skip
        out = build.call(operator.getitem, both, 0)
        (batch, heads, _, width), value = shape_of(x.k), shape_of(x.v)
        # After an exchange, u times the rows of a u-th of the heads.
        rows = x.keys.split_length(build.ranks.size)
        sent = product((batch, heads, rows, as_length(width + value[3]), x.itemsize))
        for _ in range(choice.ring - 1):
            build.record("rotation", both, sent, "keys and values of an attention, one place on", x.keys)
        mark(both, sent=as_length(sent * (choice.ring - 1)))
        return out


class Hybrid(Ring):
    """Legal where besides heads divide over some of the ranks."""

    name = "hybrid"

    def _heads_among(self, size: int) -> Iterator[int]:
        yield from (u for u in range(size // 2, 1, -1) if size % u == 0)

    def asked(self, degrees: AttentionDegrees) -> str:
        ulysses, ring = degrees.ulysses or 1, degrees.ring or 1
        return f"ulysses_degree={ulysses} and ring_degree={ring}" if ring > 1 and ulysses > 1 else ""

    def mask(self, call: Call, choice: AttentionChoice) -> Type:
        return Used()

    def lower(self, x: Attend) -> Node:
        exchange = HeadExchange(x, x.choice.ulysses)
        q, k, v = exchange.operands()
        mask = _mask_of_place(x, x.mask) if isinstance(x.mask, Node) else x.mask
        return exchange.to_tokens(self._node(x, q, k, v, mask), x.queries)


def _more(x: Attend) -> list[Any]:
    """Layouts, window, dropout and units, as far as they are not the default."""
    build, window, dropout_p, tokens = x.build, x.window, x.args.get("dropout_p"), (x.queries, x.keys)
    layouts = build.layouts(*tokens)
    units = [build.sizes(s.units) if any(n != 1 for n in s.units) else [] for s in tokens]
    if dropout_p or any(units):
        seed = build.seed(x.device) if dropout_p else None
        return [*(layouts or ([], [])), window, float(dropout_p or 0.0), seed, *(units if any(units) else [])]
    return layouts if window is None else [*(layouts or ([], [])), window]


def _mask_of_place(x: Attend, mask: Node) -> Node:
    """A whole mask -> the rows of this place's queries, and the heads of this rank."""
    build, queries, u = x.build, x.queries, x.choice.ulysses
    shape = shape_of(mask)
    if len(shape) >= 3 and not same_length(shape[-3], 1):
        mask = build.take(mask, len(shape) - 3, u)
    if len(shape) >= 2 and not (same_length(shape[-2], 1) and not same_length(queries.length, 1)):
        where = *build.sequence(queries), u, *build.at_rank()[:2]
        rows = build.call(_ops.place_positions.default, *where, x.device, *build.placed(queries))
        mask = build.call(aten.index_select.default, mask, len(shape) - 2, rows)
    return mask


def _pairs(call: Call, choice: AttentionChoice, head_tail: Seq[bool]) -> list[int]:
    """Pairs that the places of the ring compute, by size hints; the ranks of one compute the same, of other heads."""
    assert choice.queries is not None
    lengths, units = (tuple(map(hint, n)) for n in (choice.queries.lengths, choice.queries.units))
    tokens = lengths, tuple(choice.queries.whole), tuple(head_tail), units
    window = choice.op.window_in(call)
    return [pairs_of(tokens, tokens, True, choice.ulysses, choice.ring, place, window) for place in range(choice.ring)]
