"""What a method of attention is: one object that says when it is legal, what it costs, which types it needs of its
operands, and how it is written.

A new method is a file in ``methods`` and a line in its list; its operator, if it has one, is in ``kernels/attention``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxsp.config import AttentionDegrees
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.question import AttentionChoice, Question
from fxsp.passes.graph import Call
from fxsp.types import Replicate, Sequence, Shard, Type, Used, same_length

__all__ = ["Method", "own_heads"]


class Method:
    """One way to attend; see the module's docstring.  The defaults are those of queries that stay where they are."""

    name: str
    #: Whether an attention that runs so is none that degrees speak of.
    beyond_degrees: bool = False
    #: Whether a rank computes its own heads of an operator that has an entry for each.
    exchanges_heads: bool = False
    #: What it needs of all but keys and values where queries are whole and these are split.
    beside_keys: Type = Replicate()

    def ways(self, question: Question) -> Iterator[Way]:
        """What it costs, for all degrees that it may have, or why it is not legal; nothing where it is out of place."""
        raise NotImplementedError

    def asked(self, degrees: AttentionDegrees) -> str:
        """The options that ask for it, as text; empty if none does."""
        return ""

    def needs(self, call: Call, choice: AttentionChoice, queries: Type, tokens: int) -> dict[str, Type]:
        """What each of the tensor arguments must be; ``tokens`` is their dimension of tokens."""
        op = choice.op
        keys: Type = Used() if choice.keys is None else Shard(tokens, choice.keys)
        if choice.queries is None and choice.keys is not None:
            given = [name for name, value in call.arguments.items() if isinstance(value, Node)]
            return {name: keys if name in (op.key, op.value) else self.beside_keys for name in given}
        needed: dict[str, Type] = {op.query: queries, op.key: keys, op.value: keys}
        for name, dim in op.per_head.items():
            if isinstance(call[name], Node):
                needed[name] = own_heads(call, name, dim) if self.exchanges_heads else Used()
        if op.mask is not None and op.mask_in(call) is not None:
            needed[op.mask] = self.mask(call, choice)
        return needed

    def mask(self, call: Call, choice: AttentionChoice) -> Type:
        """What it needs of the mask: rows that are split like the queries, unless one row serves all of them."""
        op = choice.op
        assert op.mask is not None
        assert choice.queries is not None
        mask, q = call.shape(op.mask), op.laid(call.shape(op.query))
        if len(mask) < 2 or (same_length(mask[-2], 1) and not same_length(q[-2], 1)):
            return Used()
        return Shard(len(mask) - 2, choice.queries, origin="the mask of a rank's own query rows")

    def wants_head_tail(self, call: Call, choice: AttentionChoice) -> bool:
        """Whether the busiest rank has less to compute where each has heads and tails of the tokens."""
        return False

    def work(self, call: Call, choice: AttentionChoice) -> str:
        """For the report: what the ranks compute, if that differs."""
        return ""

    def lower(self, x: Attend) -> Node:
        """Write it; the local output, heads first."""
        raise NotImplementedError


def own_heads(call: Call, name: str, dim: int) -> Type:
    """A tensor with an entry for each head: those of a rank's own heads."""
    shape = call.shape(name)
    return Shard(dim % len(shape), Sequence.of(shape[dim]), origin=f"the {name} of a rank's own heads")
