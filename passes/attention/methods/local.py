"""Local attention: queries stay, keys and values are whole on every rank; nothing moves.

Keys and values among the graph's outputs (the cache of a language model) become whole anyway: then nothing else is
sent, and what they cost is said.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxsp.machine import Travel
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.method import Method
from fxsp.passes.attention.question import Question

__all__ = ["Local"]


class Local(Method):
    """Legal where the operator runs on some of the queries."""

    name = "local"
    beyond_degrees = True

    def ways(self, question: Question) -> Iterator[Way]:
        if question.keys is None:
            outputs = question.outputs is not None
            note = "its keys and values are outputs of the graph, gathered once for both" if outputs else ""
            sent = question.outputs or 0
            travels = (Travel("all_gather", question.size, 0, sent),)
            yield Way(self.name, sent, messages=0, refusal=question.per_rows, note=note, travels=travels)

    def lower(self, x: Attend) -> Node:
        return x.rows(x.k, x.v)
