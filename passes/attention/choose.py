"""Which of the legal ways to run an attention is taken: the cheapest, unless degrees are given.

Costs are those of :mod:`fxsp.passes.attention.cost`; heads are never padded.

* Where heads divide over the ranks they are exchanged (in attention of tokens to themselves), unless another way takes
  at most three quarters of the time: after an exchange a rank holds keys and values of its own heads only.
* A causal attention whose heads divide is always exchanged: a kernel that knows the causal flag skips half of the work,
  and on a rank's own queries the flag would have to become a mask.
* Where key/value heads do not divide but query heads do, they may be repeated before the exchange; otherwise heads are
  exchanged within a ring, or go around a ring, or keys and values are gathered.
* Keys and values are not gathered if they are more than ``gather_limit`` bytes, as long as there is another way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.attention.cost import Candidate, Link, exchange_bytes, factorizations
from fxsp.passes.base import Program
from fxsp.passes.rules.decide import hint
from fxsp.types import Length, Sequence, as_length, product, same_length

__all__ = ["GATHER_LIMIT", "Question", "choose", "limited"]

#: Bytes of keys and values of one attention that a rank may hold gathered, where there is another way.
GATHER_LIMIT = 2**30
#: Another way is taken instead of an exchange of heads if it takes at most this part of its time.
_WORTH = 0.75


@dataclass(frozen=True)
class Question:
    """One attention whose queries, keys and values are split by tokens."""

    #: Global shapes ``[B, H, S, D]`` (or without heads); keys and values with the heads that travel.
    q: tuple[Length, ...]
    k: tuple[Length, ...]
    v: tuple[Length, ...]
    #: The tokens of the queries; those of the keys, too, where queries are whole.
    queries: Sequence
    keys: Sequence
    #: The queries as a fake tensor: dtype and device.
    like: torch.Tensor
    #: How often keys and values are repeated for the query heads, after they have travelled.
    repeat: int
    program: Program
    causal: bool = False
    #: Why it cannot run on some of the queries, or block by block; empty where it can.
    per_rows: str = ""
    blocks: str = ""

    @property
    def kv_bytes(self) -> Length:
        """Local bytes of keys and values; rows of whole segments do not travel with them."""
        rows = self.keys.split_length(self.program.ranks.size)
        return product((*self.k[:-2], rows, self.k[-1] + self.v[-1], self.like.element_size()))

    @property
    def q_bytes(self) -> Length:
        """Local bytes of queries and output; the output brings rows of whole segments the other ranks' heads."""
        size = self.program.ranks.size
        width = self.queries.split_length(size) * self.q[-1] + self.queries.local_length(size) * self.v[-1]
        return product((*self.q[:-2], as_length(width), self.like.element_size()))

    @property
    def gathered_bytes(self) -> Length:
        """Bytes of all keys and values."""
        return product((*self.k[:-2], self.keys.length, self.k[-1] + self.v[-1], self.like.element_size()))

    @property
    def widened(self) -> float:
        """How much wider gradients are when they are summed than keys and values are."""
        return summand_dtype(self.like.dtype).itemsize / self.like.dtype.itemsize

    @property
    def ring_refusal(self) -> str:
        """Why it cannot be computed by blocks of keys, for its shapes; empty where it can."""
        return _ring_refusal(self.q, self.k, self.repeat)

    def exchange(self, method: str, u: int, r: int) -> Candidate:
        """Heads exchanged among ``u`` ranks, in a ring of ``r``."""
        spread = _spread(self.q, self.k, u)
        kv_bytes = as_length(self.kv_bytes * spread)
        k = (self.k[0], as_length(self.k[1] * spread), *self.k[2:]) if len(self.k) == 4 else self.k
        refusal = (self.blocks or self.ring_refusal) if r > 1 else ""
        refusal = refusal or _ulysses_refusal(self.q, k, u)
        sent, backward = (exchange_bytes(self.q_bytes, kv_bytes, u, r, n) for n in (1, 1 + self.widened))
        return Candidate(method, u, r, sent, backward if self.program.training else None, spread, refusal)

    def gather(self) -> Candidate:
        """All keys and values on every rank."""
        sent = as_length((self.program.ranks.size - 1) * self.kv_bytes)
        backward = as_length(sent * int(self.widened)) if self.program.training else None
        return Candidate("gather_kv", 1, 1, sent, backward, 1, self.per_rows)


def choose(question: Question) -> tuple[Candidate | None, tuple[tuple[str, str], ...], str]:
    """The way that is taken, the others with their costs or why they are not legal, and the cost of the one taken.

    None if no way is legal.
    """
    program = question.program
    link = Link.of(question.like.device.type, program.options.latency, program.options.bandwidth)
    whole, *rings = (question.exchange(*way) for way in factorizations(program.ranks.size))
    gather = question.gather()
    asked = _asked(question, gather, [whole, *rings])
    if asked is not gather:
        gather = limited(question, gather, [whole, *rings])
    ways = (whole, gather, *rings)
    legal = [way for way in ways if not way.refusal]
    best: Candidate | None = None
    note = ""
    if asked is not None and not asked.refusal:
        best = asked
    elif legal:
        best = min(legal, key=lambda c: (c.seconds(link), c.messages))
        if not whole.refusal and whole.spread == 1 and question.queries.same_as(question.keys):
            cheaper = best.seconds(link) <= _WORTH * whole.seconds(link)
            best = best if cheaper and not question.causal else whole
        if asked is not None:
            note = f"; {asked.name} was asked for, but {asked.refusal}"
    rejected = tuple((c.name, c.text(link)) for c in ways if c is not best)
    return best, rejected, f"{best.cost(link)}{note}" if best is not None else ""


def _asked(question: Question, gather: Candidate, exchanges: list[Candidate]) -> Candidate | None:
    """What the degrees that are given ask for."""
    program = question.program
    if program.degrees.allgather is not None and program.degrees.allgather > 1:
        return gather
    return next((c for c in exchanges if c.ring == program.degrees.ring), None)


def limited(question: Question, gather: Candidate, others: list[Candidate]) -> Candidate:
    """Gathered keys and values are refused where they are too many, and there is another way."""
    limit = GATHER_LIMIT if question.program.options.gather_limit is None else question.program.options.gather_limit
    if gather.refusal or hint(question.gathered_bytes) <= limit or all(c.refusal for c in others):
        return gather
    held = f"{question.gathered_bytes} bytes of keys and values would be on every rank, more than gather_limit={limit}"
    return replace(gather, refusal=held)


def _spread(q: tuple[Length, ...], k: tuple[Length, ...], size: int) -> int:
    """How often to repeat key/value heads before the exchange, so that they divide over the ranks; 1 if it is moot."""
    if len(q) != 4 or not isinstance(q[1], int) or not isinstance(k[1], int) or q[1] % k[1]:
        return 1
    shared = q[1] // k[1]
    fits = (n for n in range(1, shared + 1) if shared % n == 0 and k[1] * n % size == 0)
    return next(fits, 1)


def _ring_refusal(q: tuple[Length, ...], k: tuple[Length, ...], repeat: int) -> str:
    """Why keys and values cannot go around a ring, or nothing; ``k`` has the heads that travel."""
    if len(q) != 4 or len(k) != 4:
        return f"queries of {len(q)} dimensions have no head dimension"
    if not isinstance(q[1], int) or not isinstance(k[1], int) or q[1] % (k[1] * repeat):
        return f"{k[1]} key/value heads do not divide {q[1]} query heads"
    if not same_length(q[0], k[0]):
        return "queries and keys differ in batch size"
    return ""


def _ulysses_refusal(q: tuple[Length, ...], k: tuple[Length, ...], size: int) -> str:
    """Why heads cannot be exchanged, or nothing."""
    if len(q) != 4 or len(k) != 4:
        return f"queries of {len(q)} dimensions have no head dimension"
    for name, heads in (("query", q[1]), ("key/value", k[1])):
        if not isinstance(heads, int) or heads % size:
            return f"{heads} {name} heads do not divide over {size} ranks"
    if not same_length(q[0], k[0]):
        return "queries and keys differ in batch size"
    return ""
