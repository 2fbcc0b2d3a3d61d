"""Gathered keys and values: queries stay where they are, split or whole, and attend to all of them.

::

    %q, %k, %v: [B, 4, 3, 8]
    %cat:       [B, 4, 3, 16]    keys and values side by side: one all-gather
    %gather:    [B, 4, 5, 16]    in global order, without pads
    %attention: [B, 4, 3, 8]     of a rank's own rows; a causal flag becomes a mask of them
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.machine import Travel
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.method import Method
from fxsp.passes.attention.question import Question
from fxsp.passes.graph import facts, mark, shape_of
from fxsp.types import as_length

__all__ = ["GatherKV"]

aten = torch.ops.aten


class GatherKV(Method):
    """Legal where the operator runs on some of the queries."""

    name = "gather_kv"

    def ways(self, question: Question) -> Iterator[Way]:
        if question.keys is None:
            return
        sent = as_length((question.size - 1) * question.kv_bytes)
        # Whole queries meet them on every rank alike: so are their gradients.
        back = as_length(sent * int(question.widened)) if question.queries is not None else 0
        backward = back if question.program.training else None
        moved = Travel("all_gather", question.size, 2 if backward else 1, as_length(sent + (backward or 0)))
        yield Way(self.name, sent, backward, refusal=question.per_rows, held=question.gathered_bytes, travels=(moved,))

    def asked(self, degrees: AttentionDegrees) -> str:
        return f"allgather_degree={degrees.allgather}" if (degrees.allgather or 1) > 1 else ""

    def lower(self, x: Attend) -> Node:
        build, keys = x.build, x.keys
        widths = [shape_of(x.k)[-1], shape_of(x.v)[-1]]
        both = build.call(aten.cat.default, [x.k, x.v], -1)
        whole = build.gather(both, len(x.shape) - 2, keys, used=x.choice.queries is not None)
        build.record("all_gather", whole, x.choice.way.sent, "keys and values of an attention", keys)
        parts = build.call(aten.split_with_sizes.default, whole, build.sizes(widths), -1)
        k, v = (build.call(operator.getitem, parts, i) for i in (0, 1))
        for new, old in ((k, x.k), (v, x.v)):
            mark(new, whole=facts(old).whole)
        return x.rows(k, v)
