"""Ulysses: all ranks exchange tokens for heads, and attend to all tokens of their own (arXiv:2309.14509).

Queries stay as they arrive, rank by rank and with pads, as long as nothing looks at their order: then nothing moves on
either side of the attention.  Of keys and values pads must go, unless the causal flag hides them, and several segments
with pads are put in global order by ``unpack``; so are queries whose order counts, and ``pack`` is the way back.  Heads
of all batch entries count as heads of one, unless a mask tells them apart: else the output of a larger batch would lie
batch first, and had to be copied to be sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.machine import Machine
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.exchange import HeadExchange, exchanging
from fxsp.passes.attention.method import Method, own_heads
from fxsp.passes.attention.operators import SDPA
from fxsp.passes.attention.question import AttentionChoice, Question
from fxsp.passes.graph import Call, shape_of
from fxsp.types import Type, Used, as_length, same_length

__all__ = ["Ulysses"]

#: Another way is taken instead of an exchange of heads if it takes at most this part of its time.
_WORTH = 0.75


class Ulysses(Method):
    """Legal where heads divide over the ranks."""

    name = "ulysses"
    exchanges_heads = True

    def ways(self, question: Question) -> Iterator[Way]:
        if question.queries is None or question.keys is None:
            return
        # A kernel that knows the causal flag skips half of the work, which is priced where the machine is known.
        to_themselves = question.queries.same_as(question.keys)
        unpriced = question.causal and not isinstance(question.program.options.machine, Machine)
        margin = (0.0 if unpriced else _WORTH) if to_themselves else None
        yield exchanging(self.name, question, question.size, margin=margin)

    def asked(self, degrees: AttentionDegrees) -> str:
        return f"ulysses_degree={degrees.ulysses}" if (degrees.ulysses or 1) > 1 and degrees.ring == 1 else ""

    def mask(self, call: Call, choice: AttentionChoice) -> Type:
        name = choice.op.mask
        assert name is not None
        shape = call.shape(name)
        return own_heads(call, name, len(shape) - 3) if _per_head(shape) else Used()

    def lower(self, x: Attend) -> Node:
        queries = x.queries
        queries_come, keys_come = _as_they_come(x)
        # Dropout tells batch entries apart.
        alike = _is_for_all_heads(x.mask) and not x.args.get("dropout_p")
        exchange = HeadExchange(x, x.build.ranks.size, x.op.op is SDPA and isinstance(x.shape[0], int) and alike)
        q, k, v = exchange.operands(queries_come, keys_come)
        come = as_length(queries.local_length(x.build.ranks.size) * x.build.ranks.size)
        out = x.attend(q, k, v, x.mask, x.causal, own_heads_of=come if queries_come else queries.length)
        return exchange.to_tokens(out, queries, queries_come)


def _as_they_come(x: Attend) -> tuple[bool, bool]:
    """Whether queries (and the output), and keys and values, may stay as they arrive: rank by rank, with pads.

    Rows of queries may come in any order, and some may be pads, if no mask and no causal flag tells one from
    another.  Keys and values may, if there is no mask at all, and no pads.  Of one contiguous segment pads stand
    at the end: there the causal flag itself hides them from all tokens, and queries and keys keep them alike.
    """
    mask, queries, keys = x.mask, x.queries, x.keys
    if any(queries.whole) or x.op.positional or x.op.per_head or x.window is not None:
        return False, False
    if x.causal:
        alike = mask is None and len(queries.segments) == 1 and queries.same_as(keys) and not any(queries.head_tail)
        return alike, alike
    free = not _has_rows(mask), mask is None and not any(keys.whole) and not keys.has_pads(x.build.ranks.size)
    # An operator that is registered may want as many queries as keys.
    return free if x.op.builtin or all(free) else (False, False)


def _has_rows(mask: Any) -> bool:
    """Whether a mask may tell one query from another."""
    if not isinstance(mask, Node):
        return mask is not None
    shape = shape_of(mask)
    return len(shape) >= 2 and not same_length(shape[-2], 1)


def _per_head(shape: Any) -> bool:
    """Whether a mask of this shape may differ from head to head."""
    return len(shape) >= 3 and not same_length(shape[-3], 1)


def _is_for_all_heads(mask: Any) -> bool:
    """Whether a mask, if there is one, is the same for all heads of all batch entries."""
    if not isinstance(mask, Node):
        return mask is None
    return all(same_length(n, 1) for n in shape_of(mask)[:-2])
