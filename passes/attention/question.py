"""What is asked about one attention before a method is chosen for it, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.operators import AttentionOp
from fxsp.passes.base import Program
from fxsp.types import Length, Sequence, product, same_length

__all__ = ["AttentionChoice", "Question"]


@dataclass(frozen=True)
class Question:
    """One attention of split tokens."""

    #: Global shapes ``[B, H, S, D]`` (or without heads); keys and values with the heads that travel.
    q: tuple[Length, ...]
    k: tuple[Length, ...]
    v: tuple[Length, ...]
    #: The tokens of the queries, and of the keys and values; None: whole on every rank.
    queries: Sequence | None
    keys: Sequence | None
    #: The queries as a fake tensor: dtype and device.
    like: torch.Tensor
    #: How often keys and values are repeated for the query heads, after they have travelled.
    repeat: int
    program: Program
    causal: bool = False
    #: Why it cannot run on some of the queries, or block by block; empty where it can.
    per_rows: str = ""
    blocks: str = ""
    #: Bytes that whole keys and values cost that are gathered in any case, because they are outputs of the graph, too.
    outputs: Length | None = None
    #: Keys before a query that it sees, where not all (causal only).
    window: int | None = None

    @property
    def size(self) -> int:
        return self.program.ranks.size

    @property
    def kv_bytes(self) -> Length:
        """Local bytes of keys and values; rows of whole segments do not travel with them."""
        assert self.keys is not None
        return self._kv_bytes(self.keys.split_length(self.size))

    @property
    def gathered_bytes(self) -> Length:
        """Bytes of all keys and values."""
        assert self.keys is not None
        return self._kv_bytes(self.keys.length)

    def _kv_bytes(self, rows: Length) -> Length:
        return product((*self.k[:-2], rows, self.k[-1] + self.v[-1], self.like.element_size()))

    @property
    def widened(self) -> float:
        """How much wider gradients are when they are summed than keys and values are."""
        return summand_dtype(self.like.dtype).itemsize / self.like.dtype.itemsize

    @property
    def blocks_refusal(self) -> str:
        """Why it cannot be computed by blocks of keys, or nothing."""
        return self.blocks or self._headless() or self._shared() or self._batches()

    def heads_refusal(self, size: int, spread: int = 1) -> str:
        """Why heads, those of keys repeated ``spread`` times, cannot be exchanged among ``size`` ranks, or nothing."""
        return self._headless() or self._indivisible(size, spread) or self._batches()

    def _headless(self) -> str:
        return "" if len(self.q) == len(self.k) == 4 else f"queries of {len(self.q)} dimensions have no head dimension"

    def _shared(self) -> str:
        q, k = self.q[1], self.k[1]
        served = isinstance(q, int) and isinstance(k, int) and q % (k * self.repeat) == 0
        return "" if served else f"{k} key/value heads do not divide {q} query heads"

    def _indivisible(self, size: int, spread: int) -> str:
        for name, heads in (("query", self.q[1]), ("key/value", product((self.k[1], spread)))):
            if not isinstance(heads, int) or heads % size:
                return f"{heads} {name} heads do not divide over {size} ranks"
        return ""

    def _batches(self) -> str:
        return "" if same_length(self.q[0], self.k[0]) else "queries and keys differ in batch size"


@dataclass(frozen=True)
class AttentionChoice:
    """How one attention runs; ``Decision.detail`` of its call."""

    way: Way
    op: AttentionOp
    #: The tokens of the queries, and of the keys and values (None: whole on every rank).
    queries: Sequence | None
    keys: Sequence | None
    #: How often each key/value head is repeated for the query heads.
    repeat: int = 1
    #: The other ways with their costs, or why they are not legal.
    rejected: tuple[tuple[str, str], ...] = ()
    #: For the report: messages and time.
    detail: str = ""

    @property
    def method(self) -> str:
        """The name of the method, one of those of :data:`fxsp.passes.attention.methods.METHODS`."""
        return self.way.method

    @property
    def ulysses(self) -> int:
        return self.way.ulysses

    @property
    def ring(self) -> int:
        return self.way.ring
