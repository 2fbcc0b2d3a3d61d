"""zigzag: the tokens of a causal ring are split into heads and tails, so that every rank has the same to compute.

With contiguous rows the first rank of a causal ring sees one block of keys, and the last one all of them (unless there
is a window, and all of them see as much).  Types are there, so the attentions that will be causal rings over one
sequence are known; their segments get the layout ``head-tail`` (see :class:`fxsp.types.Segment`) where the plan splits
them, and types are found once more.

Before and after, for a causal attention on a ring::

    %annotate S(1, [37])               S(1, [37 head-tail])
    %linear   S(1, [37])               S(1, [37 head-tail])
    %sdpa     S(2, [37])               S(2, [37 head-tail])

It is a layout of tokens, not another program: who needs the order of tokens is given it, as before.  If more values
would have to be gathered than with contiguous rows, contiguous they stay, and the report says so.

After this pass ``program.head_tail`` are the lengths of the segments that are split so.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxsp.passes.attention.methods import METHODS
from fxsp.passes.attention.question import AttentionChoice
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import Call, facts, type_of
from fxsp.passes.propagate.propagate import Propagate
from fxsp.passes.rules.decide import weights
from fxsp.types import Length, Shard, same_length

__all__ = ["Zigzag"]


class Zigzag(Pass):
    """After this pass causal rings are balanced, where nothing else would pay for it."""

    def apply(self, program: Program) -> Program:
        lengths: list[Length] = []
        for node in program.graph.nodes:
            for n in _lengths(node):
                if not any(same_length(n, m) for m in lengths):
                    lengths.append(n)
        if not lengths:
            return program
        before = _gathered(program)
        program.head_tail = tuple(lengths)
        Propagate().apply(program)
        after = _gathered(program)
        if after > before:
            program.head_tail = ()
            Propagate().apply(program)
            program.report.notes.append(
                f"a causal ring over contiguous tokens: its last rank has the most to compute; with heads and tails of "
                f"the sequence on each rank, {after - before} more bytes would be gathered"
            )
        return program


def _lengths(node: Node) -> Iterator[Length]:
    decision = facts(node).decision
    if decision is not None and isinstance(choice := decision.detail, AttentionChoice):
        if choice.queries is not None and METHODS[choice.method].wants_head_tail(Call(node), choice):
            yield from (s.units for s in choice.queries.segments if s.sharded)


def _gathered(program: Program) -> int:
    """Bytes, global and by size hints, of the values that some call needs in another form than they have."""
    found: dict[tuple[Node, str], int] = {}
    for node in program.graph.nodes:
        decision = facts(node).decision
        if decision is None:
            continue
        call = Call(node)
        for old, needed, sent, free in zip(call.operands, decision.operands, *weights(call), strict=True):
            have = type_of(old)
            if isinstance(have, Shard) and not have.same_as(needed) and not free:
                found[old, str(needed)] = sent
    return sum(found.values())
